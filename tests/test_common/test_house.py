"""The structure: which folder may import which, how long a module may be, and that nothing is kept for tests alone."""

import ast
import re
from collections import Counter

from conftest import ROOT

FLOORS = {"common": 0, "data": 1, "models": 1, "rewards": 2, "rollout": 2, "training": 3, "evaluation": 3}
MODULES = sorted((ROOT / "phi2_grpo").glob("*/*.py"))


def test_imports_go_down():
    """Five floors: scripts, training | evaluation, rewards | rollout, data | models, common. Rooms of one floor are strangers."""
    assert {path.parent.name for path in MODULES} == set(FLOORS)
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"config"}
    for path in MODULES:
        room = path.parent.name
        for name in re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE):
            assert name.split(".")[0] not in scripts, f"{path} imports the script {name}"
            if name.startswith("phi2_grpo."):
                other = name.split(".")[1]
                assert other == room or FLOORS[other] < FLOORS[room], f"{path} imports {name}"


def test_no_module_is_long():
    limits = {"hf_app/app.py": 420, "hf_app/engine.py": 400, "config.py": 230}
    for path in [*MODULES, *ROOT.glob("*.py"), *(ROOT / "hf_app").glob("*.py")]:
        usual = 1 if path.name == "__init__.py" else 200 if path.parent == ROOT else 300
        longest = limits.get(path.relative_to(ROOT).as_posix(), usual)
        assert len(path.read_text().splitlines()) <= longest, path


def test_nothing_is_defined_for_tests_alone():
    sources = [*MODULES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    words = Counter(word for path in sources for word in re.findall(r"\w+", path.read_text()))
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert words[node.name] > 1, f"{path.name}: {node.name} is used nowhere"
