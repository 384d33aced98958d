"""The house rules of the design, read off the source: floors, heavy libraries, sizes, nothing executed on loading."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import carvae

PACKAGE = Path(carvae.__file__).parent
ROOT = PACKAGE.parent
# A folder or a module on top stands on one floor and imports only from the floors below.
FLOOR = {
    "errors": 0,
    **dict.fromkeys(
        (
            "section",
            "section_patient",
            "section_respond",
            "section_report",
            "section_compare",
            "section_plan",
            "config",
        ),
        1,
    ),
    **dict.fromkeys(("data", "labels"), 2),
    **dict.fromkeys(("model", "plots"), 3),
    **dict.fromkeys(("response", "page", "watch"), 4),
    **dict.fromkeys(("ingest", "train", "predict", "map", "studies", "doctor", "export"), 5),
    **dict.fromkeys(("evaluation", "plan", "explain", "respond", "clones", "forecast", "gate"), 6),
    **dict.fromkeys(("evaluate", "perturb", "report", "compare", "check", "reproduce"), 7),
    **dict.fromkeys(("demo", "web", "invocation"), 8),
    **dict.fromkeys(("app", "groups", "verbs"), 9),
    "cli": 10,
    "__main__": 11,
}
# Training rebuilds a store that is out of date; a config is made of sections.
_SECTIONS = ("section", "section_patient", "section_respond", "section_report", "section_compare", "section_plan")
BESIDE = {("train", "ingest"), *((a, "section") for a in _SECTIONS[1:]), *(("config", a) for a in _SECTIONS)}
ONLY_IN = {
    "lightning": {"model/objective.py", "model/trainer.py", "model/dashboard.py"},
    "pytorch_lightning": {"model/trainer.py"},
    "wandb": {"model/dashboard.py"},
    "scvi": {"model/scvi_bridge.py", "evaluation/scvi_baselines.py"},
    "scib_metrics": {"evaluation/integration.py"},
    "scirpy": {"data/contigs.py"},
    "captum": {"model/attribution.py"},
    "celltypist": {"evaluation/baselines.py"},
}
EXECUTING_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
EXECUTING_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "read_pickle", "to_pickle"}
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True)}
UNSAFE_WITH = {"np.load": ("allow_pickle", True), "numpy.load": ("allow_pickle", True)}
HEAVY = ("torch", "lightning", "scvi", "wandb", "scanpy", "anndata", "umap", "numba", "sklearn", "matplotlib")
MAX_FILE = 400
MAX_FUNCTION = 50

MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = [*MODULES.values(), *sorted((ROOT / "scripts").glob("*.py"))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Each imported name in full, wherever the import stands: ``from a.b import c`` gives ``a.b.c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(module: str, tree: ast.AST) -> list[str]:
    """The imports of ``module`` (a path in the package) that its floor does not allow."""
    unit = unit_of(module)
    wrong = []
    for name in imports_of(tree):
        parts = name.split(".")
        if parts[0] != "carvae" or name == "carvae.__version__":
            continue
        other = parts[1] if len(parts) > 1 else "__init__"
        if other != unit and (unit, other) not in BESIDE and not FLOOR.get(other, 99) < FLOOR[unit]:
            wrong.append(name)
    return wrong


def unit_of(module: str) -> str:
    return module.split("/", maxsplit=1)[0].removesuffix(".py")


def misplaced(module: str, tree: ast.AST) -> list[str]:
    """The imports of heavy libraries that have a place, and it is not ``module``."""
    return [name for name in imports_of(tree) if module not in ONLY_IN.get(name.split(".")[0], {module})]


def executing(tree: ast.AST) -> list[str]:
    """Imports and calls by which reading a file could run code."""
    found = [name for name in imports_of(tree) if name.split(".")[0] in EXECUTING_MODULES]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        # `model.eval()` is a mode of torch; `pandas.read_pickle` is the same under any alias.
        known = name if name in EXECUTING_CALLS else name.split(".")[-1] if "pickle" in name else ""
        if known in EXECUTING_CALLS:
            found.append(f"line {call.lineno}: {name}")
        for table, wanted in ((SAFE_ONLY_WITH, False), (UNSAFE_WITH, True)):
            if name in table and (given.get(table[name][0]) is table[name][1]) is wanted:
                found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def long_functions(tree: ast.AST) -> list[str]:
    """Functions with more lines than allowed, the docstring not counted."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > MAX_FUNCTION:
                found.append(f"{node.name} ({lines} lines)")
    return found


def own_imports(module: str) -> set[str]:
    """The modules of the package that ``module`` imports, as paths."""
    found = set()
    for name in imports_of(parse(MODULES[module])):
        path = name.removeprefix("carvae.").replace(".", "/")
        options = (f"{path}.py", f"{path.rpartition('/')[0]}.py", f"{path}/__init__.py")
        found |= {option for option in options if name.startswith("carvae.") and option in MODULES} - {module}
    return found


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__.py"}))
def test_imports_point_down(module: str) -> None:
    assert unit_of(module) in FLOOR, f"give carvae/{module} a floor in {Path(__file__).name}"
    wrong = upward(module, parse(MODULES[module]))
    assert not wrong, f"carvae/{module} stands on floor {FLOOR[unit_of(module)]} and imports {wrong}"


def test_modules_import_each_other_without_cycles() -> None:
    graph = {module: own_imports(module) for module in MODULES if module != "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_place(module: str) -> None:
    assert not misplaced(module, parse(MODULES[module]))


@pytest.mark.parametrize("module", MODULES)
def test_reading_a_file_executes_nothing(module: str) -> None:
    assert not executing(parse(MODULES[module]))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= MAX_FILE, f"{path.name} has {n_lines} lines"
    assert not long_functions(parse(path))


@pytest.mark.parametrize(
    ("module", "source", "check"),
    [
        ("data/genes.py", "from carvae.labels.tree import LabelTree", upward),
        ("data/genes.py", "def f():\n    from carvae import train", upward),
        ("labels/tree.py", "import carvae.data.genes", upward),
        ("predict.py", "from carvae.train import fit", upward),
        ("model/vae.py", "from carvae.nowhere import x", upward),
        ("model/vae.py", "import carvae", upward),
        ("predict.py", "def f():\n    import lightning.pytorch as pl", misplaced),
        ("train.py", "from scvi.module import VAE", misplaced),
    ],
)
def test_the_floor_checks_see_a_fault(module: str, source: str, check: object) -> None:
    assert callable(check)
    assert check(module, ast.parse(source))


def test_the_floor_checks_let_good_imports_pass() -> None:
    for source in ("from carvae import __version__", "from carvae.data.store import CellStore", "import carvae.ingest"):
        assert not upward("train.py", ast.parse(source))
    assert not misplaced("model/trainer.py", ast.parse("import lightning"))
    assert not misplaced("model/dashboard.py", ast.parse("import lightning\nimport wandb"))


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("import pickle", True),
        ("from joblib import load", True),
        ("eval('1')", True),
        ("yaml.load(text, Loader)", True),
        ("pd.read_pickle(path)", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path)", False),
        ("model.eval()", False),
        ("yaml.safe_load(text)", False),
    ],
)
def test_the_execution_check_tells_bad_from_good(source: str, faulty: bool) -> None:
    assert bool(executing(ast.parse(source))) is faulty


def test_the_size_check_counts_lines_without_the_docstring() -> None:
    docstring = '    """One.\n' + "\n" * 60 + '    """\n'
    body = "    x = 1\n"
    assert not long_functions(ast.parse("def f():\n" + docstring + body * (MAX_FUNCTION - 1)))
    assert long_functions(ast.parse("def f():\n" + docstring + body * MAX_FUNCTION))


def run_python(code: str, folder: Path) -> str:
    """What a new interpreter prints for ``code`` when it imports from ``folder``."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",)], ids=["import", "help", "version"])
def test_the_command_line_starts_without_heavy_libraries(arguments: tuple[str, ...]) -> None:
    code = f"""
    import sys
    import carvae
    from carvae.cli import main
    try:
        sys.argv = ["carvae", *{arguments!r}]
        {"main()" if arguments else "pass"}
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, loaded
    """
    printed = run_python(code, ROOT)
    if arguments == ("--version",):
        assert printed.strip() == carvae.__version__


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """The package's own entry with modules that stand in for the heavy ones."""
    package = tmp_path / "carvae"
    (package / "model").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "model/__init__.py"):
        (package / name).write_text((PACKAGE / name).read_text(encoding="utf-8"), encoding="utf-8")
    for module, names in {
        "config": ["Config"],
        "ingest": ["run"],
        "train": ["run", "fit"],
        "predict": ["embed", "annotate"],
        "model/bundle": ["load"],
    }.items():
        source = "".join(f"def {name}():\n    return '{module}.{name}'\n" for name in names)
        (package / f"{module}.py").write_text(source, encoding="utf-8")
    return tmp_path


def test_public_names_are_imported_on_first_use(small_package: Path) -> None:
    code = """
    import sys, carvae
    assert not {"carvae.config", "carvae.train", "carvae.predict"} & set(sys.modules)
    assert dir(carvae) == sorted(carvae.__all__)
    print(*(getattr(carvae, name)() for name in ("annotate", "embed", "ingest", "load", "train", "Config")))
    assert issubclass(carvae.CarvaeError, Exception) and carvae.__version__
    try:
        carvae.trian
    except AttributeError as error:
        assert "trian" in str(error)
    else:
        raise AssertionError
    """
    assert run_python(code, small_package).split() == [
        "predict.annotate",
        "predict.embed",
        "ingest.run",
        "model/bundle.load",
        "train.run",
        "config.Config",
    ]


def test_a_verb_stays_a_function_when_its_module_is_imported(small_package: Path) -> None:
    code = """
    import importlib, pickle
    import carvae.train, carvae.ingest
    from carvae.train import fit
    from carvae import train
    module = importlib.import_module("carvae.train")
    assert carvae.train is train is module.run and fit is module.fit
    assert pickle.loads(pickle.dumps(carvae.train)) is module.run
    carvae.train = fit
    print(carvae.train(), carvae.ingest())
    """
    assert run_python(code, small_package).split() == ["train.fit", "ingest.run"]


def test_every_public_name_exists_where_the_package_looks_for_it() -> None:
    for name, (module, attribute) in carvae._ON_FIRST_USE.items():
        path = MODULES[module.removeprefix("carvae.").replace(".", "/") + ".py"]
        defined = {getattr(node, "name", None) for node in parse(path).body}
        assert attribute in defined, f"carvae.{name} looks for {attribute} in {path}"
    assert set(carvae.__all__) == {*carvae._ON_FIRST_USE, "CarvaeError", "__version__"}
