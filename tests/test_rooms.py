"""Imports go in one direction: the packages of a stage form layers, drawn in docs/contributing.md; none go in a circle."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["indicators_pretraining", "quantization_search", "quantization_training"]
NAMES = {"models": "model"}  # what LIMPQ's search calls the same package
CONTRIBUTING = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
DRAWN = dict(re.findall(r"^(\w+) +imports +(.*?)$", CONTRIBUTING, re.MULTILINE))
LAYERS = {name: set(re.findall(r"\w+", below)) - {"nothing"} for name, below in DRAWN.items()}


def modules_of(stage):
    """{module: path} of the production code of a stage."""
    paths = [path.relative_to(stage) for path in stage.rglob("*.py")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths
            if not {"tests", "results"} & set(path.parts)}


def imported_by(module, path, stage, modules):
    """The modules of the stage that one imports, anywhere in its code; of a package, where its own names are imported."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse((stage / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            names = [*(inner & modules.keys()), *([] if inner <= modules.keys() else [origin])]
        else:
            continue
        yield from (name for name in names if name in modules)


def layer_of(module, modules):
    first = module.partition(".")[0]
    return NAMES.get(first, first) if modules[first].name == "__init__.py" else "stage"


@pytest.fixture(params=STAGES, scope="module")
def imports(request):
    """({module: modules that it imports}, {module: its layer}) of a stage."""
    stage = ROOT / request.param
    modules = modules_of(stage)
    return ({module: set(imported_by(module, path, stage, modules)) for module, path in modules.items()},
            {module: layer_of(module, modules) for module in modules})


def test_a_layer_imports_only_what_the_diagram_says(imports):
    imported, layers = imports
    wrong = [f"{module} imports {other}" for module, others in imported.items() for other in others
             if layers[other] not in {layers[module], *LAYERS[layers[module]]}]
    assert not wrong


def test_every_arrow_of_the_diagram_is_an_import():
    found = set()
    for stage in STAGES:
        modules = modules_of(ROOT / stage)
        for module, path in modules.items():
            found |= {(layer_of(module, modules), layer_of(other, modules))
                      for other in imported_by(module, path, ROOT / stage, modules)}
    assert {(above, below) for above, below in found if above != below} == {
        (above, below) for above, belows in LAYERS.items() for below in belows}


def test_the_diagram_has_one_direction():
    assert list(graphlib.TopologicalSorter(LAYERS).static_order())


def test_no_modules_import_each_other_in_a_circle(imports):
    list(graphlib.TopologicalSorter(imports[0]).static_order())  # raises CycleError, which names the circle


def test_the_search_carries_no_module_that_it_never_reaches():
    stage = ROOT / "quantization_search"
    modules = modules_of(stage)
    reached, ahead = set(), [module for module in modules if "." not in module and layer_of(module, modules) == "stage"]
    while ahead:
        module = ahead.pop()
        parents = {module[:end] for end in range(len(module)) if module[end] == "."}  # a package's own code comes with it
        ahead += ({*imported_by(module, modules[module], stage, modules)} | parents) - reached - {module}
        reached.add(module)
    assert reached == modules.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_no_module_imports_a_command(stage):
    stage = ROOT / stage
    modules = modules_of(stage)
    commands = {module for module, path in modules.items()
                if '\nif __name__ == "__main__":\n' in (stage / path).read_text(encoding="utf-8")}
    assert "main" in commands
    assert not [f"{module} imports {other}" for module, path in modules.items()
                for other in imported_by(module, path, stage, modules) if other in commands]


def test_functions_fit_on_a_screen_and_constructors_take_few_arguments():
    for stage in STAGES:
        for path in modules_of(ROOT / stage).values():
            for node in ast.walk(ast.parse((ROOT / stage / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    where = f"{stage}/{path}: {node.name}"
                    assert node.end_lineno - node.lineno < 45, where
                    assert node.name != "__init__" or len(node.args.args) + len(node.args.kwonlyargs) <= 9, where


def test_commands_import_first_what_lets_ctrl_c_end_their_start():
    sources = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("*_*/*.py")}
    commands = {path: source for path, source in sources.items() if "__main__" in source}
    for path, source in commands.items():
        first = next(node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert getattr(first, "module", None) == "util.errors", path
    assert len(commands) >= 9
