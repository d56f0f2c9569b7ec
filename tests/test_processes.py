"""Two processes find the loss and the gradients that one finds; tokens, classes and features split over them."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import process_worker
import pytest

WORKER = Path(process_worker.__file__)
TIMEOUT = 60


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    paths = [folder / f"{index}.npz" for index in range(2)]
    logs = [path.with_suffix(".log") for path in paths]
    processes = []
    try:
        for index, (path, log) in enumerate(zip(paths, logs, strict=True)):
            command = [sys.executable, WORKER, coordinator, str(index), path]
            with log.open("w") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
        for process in processes:
            process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end after {TIMEOUT} s: " + told(logs))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], told(logs)
    return [dict(np.load(path)) for path in paths]


def told(logs):
    return "\n".join(log.read_text()[-2000:] for log in logs)


@pytest.mark.parametrize("plan", process_worker.PLANS)
@pytest.mark.parametrize("layout", process_worker.LAYOUTS)
def test_loss_and_gradients_are_those_of_one_process(results, layout, plan):
    arrays = process_worker.problem()
    value, slopes = jax.jit(jax.value_and_grad(process_worker.loss, argnums=(0, 1, 3, 4)))(*arrays)
    expected = dict(zip(("loss", "hidden", "kernel", "weights", "prior"), (value, *slopes), strict=True))
    for found in results:
        for name, x in expected.items():
            np.testing.assert_allclose(found[f"{layout}, {plan}: {name}"], x, rtol=1e-5, atol=1e-6, err_msg=name)
