"""The house: its public names, which way imports run, examples that run, and rooms that stay small."""

import ast
import doctest
import importlib
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ls

PACKAGE = pathlib.Path(jax_ls.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
TESTS = sorted(pathlib.Path(__file__).parent.glob("*.py"))

CONTRACT = {
    *["Target", "OneHot", "Uniform", "Dense", "Rows", "Sparse"],
    *["smooth", "smooth_labels", "smooth_binary_labels"],
    *["cross_entropy", "smoothed_cross_entropy", "kl_divergence", "sigmoid_cross_entropy", "with_label_smoothing"],
    *["mean", "reduce"],
}

# What a module may import of the package. Each may know those before it in its own row, and no others.
MAY_IMPORT = {
    "checks": set(),
    "class_axis": {"checks"},
    "algebra": {"checks", "class_axis"},
    "targets": {"checks", "class_axis", "algebra"},
    "smoothing": {"checks", "class_axis", "algebra", "targets"},
    "entropy": {"checks", "class_axis", "algebra"},
    "losses": {"checks", "class_axis", "algebra", "targets", "smoothing", "entropy"},
    "reductions": {"checks", "class_axis"},
    "chunks": {"checks", "class_axis"},
    "linear": {"checks", "class_axis", "algebra", "targets", "smoothing", "losses", "reductions", "chunks"},
    "ordinal": {"checks"},
    "neighborhoods": {"checks", "targets"},
    "priors": {"checks", "algebra", "targets", "ordinal", "neighborhoods"},
    "schedules": {"checks"},
    "predictions": {"checks", "class_axis", "algebra", "targets", "losses"},
    "controller": {"checks", "class_axis", "algebra", "predictions"},
    "adaptive": {"checks", "class_axis", "beliefs", "predictions", "controller"},
    "online": {"checks", "class_axis", "algebra", "targets", "predictions"},
    "beliefs": {"checks", "class_axis", "algebra", "targets"},
    "label_noise": {"checks", "class_axis"},
    "noise": {"checks", "class_axis", "algebra", "targets", "smoothing", "losses", "beliefs", "label_noise"},
    "penalties": {"checks", "class_axis", "algebra", "targets", "smoothing", "losses", "beliefs"},
    "results": {"checks"},
    "results_file": {"checks", "results"},
    "search": {"checks"},
    "sweeps": {"checks", "results", "results_file", "search"},
    "reliability": {"checks", "class_axis"},
    "temperature": {"checks", "class_axis", "reliability"},
    "scores": {"checks", "class_axis", "targets", "losses", "reliability"},
    "calibration": {"class_axis", "reliability", "scores", "temperature"},
    "support": {"checks", "algebra"},
    "transforms": {"checks"},
    "values": {"checks", "class_axis", "algebra", "targets", "support", "transforms"},
    "policies": {"checks", "class_axis", "algebra", "targets", "smoothing"},
    "preferences": {"checks", "class_axis", "losses", "linear", "policies"},
    "canvas": set(),
    "penultimate": {"checks", "canvas"},
    "plotting": {"checks", "algebra", "targets", "reliability", "canvas", "penultimate"},
    "nnx": {"class_axis", "targets", "losses", "adaptive", "online", "reliability", "scores"},
}

SUBMODULES = [name for name in jax_ls.__all__ if inspect.ismodule(getattr(jax_ls, name))]
OPTIONAL = ["nnx", "plotting"]


def public_names(module):
    """What a submodule offers: its `__all__`, or what it defines."""
    namespace = vars(importlib.import_module(f"jax_ls.{module}"))
    own = [name for name, x in namespace.items() if getattr(x, "__module__", None) == f"jax_ls.{module}"]
    names = namespace.get("__all__", [name for name in own if not name.startswith("_")])
    return [f"{module}.{name}" for name in names if callable(namespace[name])]


PUBLIC = [name for name in jax_ls.__all__ if name not in SUBMODULES]
PUBLIC += [name for module in [*SUBMODULES, *OPTIONAL] for name in public_names(module)]


def named(path):
    """The thing of this name, of the package or a submodule."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"jax_ls.{module}") if module else jax_ls, name)


def imports(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from [node.module] if node.module != "jax_ls" else [f"jax_ls.{name.name}" for name in node.names]
            assert node.level == 0, "imports are absolute"
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_the_contract_is_public_and_nothing_private_is():
    assert set(jax_ls.__all__) >= CONTRACT
    assert list(jax_ls.__all__) == sorted(jax_ls.__all__)
    assert all(hasattr(jax_ls, name) for name in jax_ls.__all__)
    modules = set(MODULES)
    assert {name for name in vars(jax_ls) if not name.startswith("_")} <= {*jax_ls.__all__, *modules}


def test_submodules_are_public():
    expected = {"adaptive", "calibration", "noise", "online", "penalties", "preferences", "priors", "schedules"}
    expected |= {"sweeps", "values"}
    assert set(SUBMODULES) >= expected
    for name in ("targets", "smoothing", "losses", "reductions"):
        module = importlib.import_module(f"jax_ls.{name}")
        assert any(getattr(module, public, None) is getattr(jax_ls, public) for public in jax_ls.__all__)


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    used = {name.removeprefix("jax_ls.").split(".")[0] for name in imports(module) if name.startswith("jax_ls")}
    assert used <= MAY_IMPORT[module], f"{module} imports {used - MAY_IMPORT[module]}"


def test_no_room_for_everything():
    assert not {"utils", "util", "misc", "common", "helpers", "_src"} & set(MODULES)


@pytest.mark.parametrize("path", [*PACKAGE.glob("*.py"), *TESTS], ids=lambda path: path.name)
def test_files_stay_under_300_lines(path):
    assert len(path.read_text().splitlines()) < 300


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_modules_say_what_they_are(module):
    assert importlib.import_module("jax_ls" if module == "__init__" else f"jax_ls.{module}").__doc__


SECTIONS = {"function": ("Args:", "Returns:", "Example:"), "class": ("Example:",)}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    thing = named(name)
    assert len(thing.__doc__.splitlines()) <= 40
    for section in SECTIONS["class" if isinstance(thing, type) else "function"]:
        assert section in thing.__doc__, f"{name} has no {section}"


class ToSixDigits(doctest.OutputChecker):
    """The text must be the same, numbers within what float32 holds: XLA rounds the last digit as it likes."""

    number = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")

    def check_output(self, want, got, optionflags):
        texts = [" ".join(self.number.sub("#", text).split()) for text in (want, got)]
        numbers = [[float(x) for x in self.number.findall(text)] for text in (want, got)]
        return texts[0] == texts[1] and np.allclose(*numbers, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name):
    """In a namespace of what a user has imported: the public names, jax, jnp, np and optax."""
    thing = named(name)
    namespace = {public: getattr(jax_ls, public) for public in jax_ls.__all__}
    namespace |= {"jax_ls": jax_ls, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs=namespace)
    assert sum(len(test.examples) for test in found) > 0
    report = []
    for test in found:
        doctest.DocTestRunner(checker=ToSixDigits(), verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


def test_the_checker_of_examples_sees_a_wrong_digit():
    same = ToSixDigits().check_output
    assert same("[0.6327, 1.8341]", "[0.63269997, 1.8341]", 0)
    assert not same("[0.6327, 1.8341]", "[0.6328, 1.8341]", 0)
    assert not same("[3.0]", "[3.0, 1.0]", 0)
    assert not same("Array(True)", "Array(False)", 0)


def public_callables():
    for module in MODULES:
        for name, thing in vars(importlib.import_module(f"jax_ls.{module}")).items():
            own = getattr(thing, "__module__", None) == f"jax_ls.{module}"
            if own and callable(thing) and not name.startswith("_"):
                yield pytest.param(thing, id=f"{module}.{name}")


@pytest.mark.parametrize("thing", list(public_callables()))
def test_everything_without_an_underscore_has_a_docstring(thing):
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{thing.__name__}("), "a dataclass wrote its own"
