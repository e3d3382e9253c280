"""The shape of the code: its map, who imports whom, sizes, docstrings, help texts, documented commands. 10 s.

Run: ./test.sh tests/test_house.py
"""
import ast
import importlib
import io
import re
import shlex
import socket
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

METHOD = ["vae", "sit", "mapper", "losses", "train_vae", "encode", "train_sit", "sample"]
# Who may import whom. The first six can be copied alone into another project.
ALONE = {"vae", "sit", "mapper", "losses", "data", "common"}
LIBRARY = ALONE | {"checkpoints", "attributes", "inception"}
STAGES = {"train_vae", "encode", "train_sit", "sample"}
SCRIPTS = STAGES | {"probe", "fid", "export", "plot"}
TOY = {"shapes.scenes", "shapes.networks"}
EDGES = {
    **{name: set() for name in ALONE | TOY},
    "checkpoints": ALONE,
    "attributes": {"data"},
    "inception": {"mapper"},
    **{name: LIBRARY for name in SCRIPTS},
    "bench": LIBRARY | STAGES,
    **{name: set() for name in ("study", "study.clipart")},  # they run commands, or read other people's files
    **{name: LIBRARY | TOY | {"probe", "fid", "plot"} for name in ("shapes.train", "shapes.report")},
}
TAKES_SHAPES = {"data", "mapper", "inception", "fid", "attributes", "probe"}  # inside of functions only
RUNTIME = {"torch", "numpy", "timm", "PIL", "tqdm", "scipy"}
FROM_TIMM = {"safetensors", "huggingface_hub"}  # which needs them
OPTIONAL = {"matplotlib", "wandb"}  # inside of functions only
COMMANDS = [*sorted(SCRIPTS), "bench", "study", "shapes.train", "shapes.report"]
MODULES = [*ROOT.glob("*.py"), *ROOT.glob("shapes/*.py"), *ROOT.glob("study/*.py")]
TESTS = [*ROOT.glob("tests/**/*.py")]
DOCS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def name_of(path):
    """shapes/scenes.py -> shapes.scenes"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def run_at_import(node):
    """Yield all nodes but those in bodies of functions; decorators and defaults do run at import."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        children = [*getattr(node, "decorator_list", []), node.args]
    for child in children:
        yield from run_at_import(child)


def imports(nodes):
    """Yield the name of each module that is imported: shapes.scenes, but torch of torch.nn."""
    for node in (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [f"shapes.{name}" for name in names] if node.module == "shapes" else [node.module]
        yield from (name if name.startswith("shapes") else name.split(".")[0] for name in names)


def test_scripts_say_how_threads_wait_before_torch_is_loaded():
    """OpenMP reads it once. Where there is no torch, an import ends at the place where it would be loaded."""
    program = ("import importlib, os, sys\nsys.modules['torch'] = None\nfor name in sys.argv[1:]:\n"
               "    os.environ.pop('OMP_WAIT_POLICY', 0)\n    try:\n        importlib.import_module(name)\n"
               "    except ImportError:\n        print(name, os.environ.get('OMP_WAIT_POLICY'))")
    names = [name for name in COMMANDS if name != "study"]  # which loads none
    done = subprocess.run([sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [word for name in names for word in (name, "PASSIVE")]


def test_every_file_has_its_place():
    assert {name_of(path) for path in MODULES} == {*EDGES, "shapes.__init__"}
    assert {path.stem for path in DOCS} == {
        "README", "results", "weights", "measuring", "differences", "machines"}
    others = {path.name for path in ROOT.iterdir() if path.suffix in (".sh", ".txt", ".ini")}
    assert others == {"quickstart.sh", "test.sh", "requirements.txt", "requirements-dev.txt", "pytest.ini"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_map(path):
    tree, allowed = ast.parse(path.read_text()), EDGES.get(name_of(path), set())
    at_once, anywhere = set(imports(run_at_import(tree))), set(imports(ast.walk(tree)))
    ours = {module for module in anywhere if module in EDGES or module.startswith("shapes")}
    assert at_once & ours <= allowed
    assert ours <= allowed | (TOY if name_of(path) in TAKES_SHAPES else set())
    foreign = anywhere - ours - set(sys.stdlib_module_names)
    assert foreign <= RUNTIME | FROM_TIMM | OPTIONAL and not at_once & OPTIONAL


def test_runtime_packages_are_the_six():
    listed = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert listed == {"torch", "numpy", "timm", "pillow", "tqdm", "scipy"}


def measure(path):
    """Return (code lines: neither blank nor comment nor docstring, names in them, comments)."""
    text, in_docstring, own, names, comments = path.read_text(), set(), set(), 0, 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, False):
            in_docstring |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            comments += 1
            own |= {line} if token.line.lstrip().startswith("#") else set()
        names += token.type == tokenize.NAME and line not in in_docstring
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip()}
    return len(lines - in_docstring - own), names, comments


def test_sizes_stay_within_the_budget():
    """Whoever needs more takes something away first."""
    code = {name_of(path): measure(path)[0] for path in MODULES}
    assert sum(code[name] for name in METHOD) <= 1600
    assert sum(code.values()) <= 4750
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    assert sum(len(path.read_text().splitlines()) for path in TESTS) <= 6468


@pytest.mark.parametrize("name", ["train_vae", "train_sit"])
def test_trainers_can_be_read(name):
    """At most 4.6 names in a line of code (nanoGPT's and DiT's: 3.3, 3.5), a comment for five lines."""
    code, names, comments = measure(ROOT / f"{name}.py")
    assert names <= 4.6 * code and comments >= 0.2 * code, (names / code, comments / code)


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=name_of)
def test_lines_are_at_most_110_wide(path):
    assert not [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_functions_say_what_they_do(path):
    tree = ast.parse(path.read_text())
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not node.name.startswith("_") and node.name not in ("main", "parse_args")]
    assert not [node.name for node in public if not ast.get_docstring(node)] and ast.get_docstring(tree)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_file_calls_cuda_when_it_is_imported(path):
    for node in run_at_import(ast.parse(path.read_text())):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert not re.match(r"(torch\.)?cuda\.", called), f"line {node.lineno}: {called}"


def test_no_test_reaches_another_machine():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    for host in ("192.0.2.1", "example.invalid"):
        with pytest.raises(pytest.fail.Exception, match=f"this test reaches the network: {host}"):
            socket.create_connection((host, 80), timeout=1)
    with socket.socket() as other, pytest.raises(pytest.fail.Exception, match="192.0.2.1"):
        other.settimeout(1)
        other.connect(("192.0.2.1", 80))


def commands_in(text):
    """Yield (module, arguments) of each line of a shell text that runs a script or `python -m shapes.x`."""
    for variable, first in re.findall(r"for (\w+) in ([^\s;]+)", text):  # the first round of a loop
        text = re.sub(rf"\$({variable}\b|{{{variable}}})", first, text)
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"[;|&>]", line.split(" #")[0]):
            run = re.search(r"(?:python3? (?:-m )?|torchrun (?:-\S+ )*)(\w+\.py|shapes\.\w+)(.*)", part)
            if run:
                yield run[1].removesuffix(".py"), shlex.split(run[2])


def documented_commands():
    """Return (file, module, arguments): ```sh blocks of README and docs, and the headers of the scripts."""
    blocks = re.compile(r"```sh\n(.*?)```", re.S)
    texts = [(path, block) for path in DOCS for block in blocks.findall(path.read_text())]
    for path in MODULES:
        header = ast.get_docstring(ast.parse(path.read_text()), clean=False)
        texts.append((path, "\n".join(re.findall(r"^    .*", header, re.M))))
    return [(path.name, *command) for path, text in texts for command in commands_in(text)]


def test_documented_commands_parse(capsys):
    wrong, commands = [], documented_commands()
    for where, module, arguments in commands:
        try:
            assert module in COMMANDS
            importlib.import_module(module).parse_args(arguments)
        except (SystemExit, ValueError, AssertionError) as error:
            wrong.append((where, module, *arguments, capsys.readouterr().err.splitlines()[-1:] or error))
    assert not wrong
    shown = {module for where, module, _ in commands if where.endswith(".md")}
    assert shown >= set(COMMANDS) - {"shapes.train"}


@pytest.mark.parametrize("script", COMMANDS)
def test_help_says_something_about_every_flag_with_its_default_and_a_wrong_one_is_an_error(script, capsys):
    module = importlib.import_module(script)
    for command in (["gfid"], ["rfid"], ["stats"]) if script == "fid" else ([],):
        with pytest.raises(SystemExit, match="^0$"):
            module.parse_args([*command, "-h"])
        text = capsys.readouterr().out
        flags = re.findall(r"^  (?:-h, )?(--?[\w-]+.*?)(?=^  -|^\w|\Z)", text, re.S | re.M)
        assert flags and all(re.search(r"\s{2,}\S.*\w{2}", flag) for flag in flags), flags
        assert all("(default:" in flag for flag in flags if re.match(r"\S+ \S", flag)), flags
        assert {"train_vae": "(default: 1024)", "train_sit": "(default: 256)"}.get(script, "") in text
        with pytest.raises(SystemExit, match="^2$"):
            module.parse_args([*command, "--no-such-flag"])
