"""The shape of the code: who imports whom, README commands, help texts, widths, docstrings. A few seconds.

Run: ./test.sh tests/test_house.py
"""
import ast
import importlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

LIBRARY = {"common", "data", "vae", "losses", "mapper", "sit", "features", "shapes", "weights", "attributes",
           "image_metrics", "latent_metrics", "logs"}
SCRIPTS = {"train_vae", "encode", "train_sit", "sample", "probe", "fid", "bench", "train_teacher",
           "quickstart"}
COMMANDS = SCRIPTS | {"vae", "sit"}  # these two export: python vae.py --export ...
# data.py hands out the embedded set, mapper.py shares SiT's pieces, attributes.py reads images by data.py;
# networks with published files read and write them through weights.py; vae.py and sit.py as commands report
# errors through common.py; logs.py knows the processes; scripts import the library; fid.py and probe.py have
# library halves for the report and the benchmark.
LIBRARY_EDGES = {("data", "shapes"), ("mapper", "sit"), ("attributes", "data"), ("vae", "weights"),
                 ("sit", "weights"), ("losses", "weights"), ("vae", "common"), ("sit", "common"),
                 ("logs", "common"), ("mapper", "weights"), ("features", "weights"),
                 ("weights", "common")}
SCRIPT_EDGES = {("quickstart", "probe"), ("quickstart", "fid"), ("bench", "fid")}
RUNTIME = {"torch", "numpy", "timm", "PIL", "tqdm", "scipy"}
FROM_TIMM = {"safetensors", "huggingface_hub"}  # come with timm; imported only where asked for
BEHIND_A_FLAG = {"wandb", "pytorch_fid", "torch_fidelity"}
FILES = sorted(ROOT.glob("*.py"))


def imports(path):
    """Return the top names of all imports of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_every_file_has_its_place():
    assert {path.stem for path in FILES} == LIBRARY | SCRIPTS


def test_imports_follow_the_house():
    for path in FILES:
        for name in set(imports(path)) & (LIBRARY | SCRIPTS):
            edge = (path.stem, name)
            if path.stem in LIBRARY:
                assert edge in LIBRARY_EDGES, f"{edge}: a library file imports none of ours"
            else:
                assert name in LIBRARY or edge in SCRIPT_EDGES, f"{edge}: scripts do not import scripts"


def test_runtime_packages_are_the_six():
    for path in FILES:
        foreign = set(imports(path)) - LIBRARY - SCRIPTS - set(sys.stdlib_module_names)
        assert foreign <= RUNTIME | FROM_TIMM | BEHIND_A_FLAG, f"{path.name}: {foreign}"
    listed = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert listed == {"torch", "numpy", "timm", "pillow", "tqdm", "scipy"}


def test_lines_are_at_most_110_wide():
    for path in [*FILES, *(ROOT / "tests").glob("*.py")]:
        wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        assert not wide, f"{path.name}: lines {wide}"


def test_public_functions_say_what_they_do():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_no_test_reaches_another_machine():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    for host in ("192.0.2.1", "example.invalid"):
        with pytest.raises(pytest.fail.Exception, match=f"this test reaches the network: {host}"):
            socket.create_connection((host, 80), timeout=1)
    with socket.socket() as other, pytest.raises(pytest.fail.Exception, match="192.0.2.1"):
        other.settimeout(1)
        other.connect(("192.0.2.1", 80))


def run_at_import(node):
    """Yield all nodes but those in bodies of functions; decorators and defaults do run at import."""
    yield node
    for name, value in ast.iter_fields(node):
        if name != "body" or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from run_at_import(child)


def test_no_file_calls_cuda_when_it_is_imported():
    for path in FILES:
        for node in run_at_import(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not re.match(r"(torch\.)?cuda\.", called), f"{path.name}, line {node.lineno}: {called}"


def readme_commands():
    """Every line of the README's shell blocks that runs one of our scripts, as (script, arguments)."""
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:python|torchrun \S+) (\w+)\.py(.*)", line.split("#")[0])
            if match:
                yield match[1], match[2]


def test_readme_commands_parse():
    commands = list(readme_commands())
    assert {script for script, _ in commands} >= COMMANDS - {"quickstart"}
    for script, arguments in commands:
        importlib.import_module(script).parse_args(shlex.split(arguments))


def test_quickstart_commands_parse(tmp_path):
    """quickstart.sh with a PYTHON that only prints: its commands go through the scripts' own parsers."""
    done = subprocess.run(["bash", str(ROOT / "quickstart.sh")], capture_output=True, text=True, check=True,
                          env={"PYTHON": "echo", "OUT": str(tmp_path), "PATH": "/usr/bin:/bin"})
    shown = done.stdout + (tmp_path / "plain.log").read_text()  # the plain VAE's stages go there
    lines = [line for line in shown.splitlines() if re.match(r"\w+\.py ", line)]
    assert len(lines) == 17
    for line in lines:
        script, *arguments = shlex.split(line)
        importlib.import_module(script[:-3]).parse_args(arguments)


def quickstart(tmp_path, script):
    """Start quickstart.sh with a shell script in place of python."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    env = {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(["bash", str(ROOT / "quickstart.sh")], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=env, text=True, start_new_session=True,
                            # ignored by a shell that started the tests in the background, bash cannot trap it
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_quickstart_fails_where_the_plain_vae_fails(tmp_path):
    run = quickstart(tmp_path, 'case "$*" in "fid.py rfid"*/plain/vae*) echo boom >&2; exit 3;; esac')
    errors = run.communicate()[1]
    done = (tmp_path / "out/done.txt").read_text()
    assert run.returncode == 1 and "boom" in errors and "plain" in errors
    assert "send-fid" in done and "plain-vae" in done and "plain-rfid" not in done and "probe" not in done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_quickstart_waits_for_both_and_calls_neither_done(tmp_path, number):
    """The stand-in for a trainer saves and exits 0 on a signal, as train_vae.py does."""
    run = quickstart(tmp_path, f"""case "$*" in *"--init {tmp_path}/out/pretrained"*)
        trap 'sleep 0.3; echo >> "{tmp_path}/saved"; exit 0' TERM INT
        echo >> "{tmp_path}/began"; n=0; while [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done;; esac""")
    began = tmp_path / "began"
    while not began.is_file() or len(began.read_text()) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(number)
    run.communicate()
    assert run.returncode == 128 + number and len((tmp_path / "saved").read_text()) == 2
    assert (tmp_path / "out/done.txt").read_text().startswith("pretrain ")
    assert (tmp_path / "out/done.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("script", sorted(COMMANDS))
def test_help_says_something_about_every_flag_with_its_default_and_a_wrong_one_is_an_error(script, capsys):
    module = importlib.import_module(script)
    commands = (["gfid"], ["rfid"], ["stats"], ["nearest"], ["again"]) if script == "fid" else ([],)
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            module.parse_args([*command, "-h"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        flags = re.findall(r"^  (?:-h, )?(--?[\w-]+.*?)(?=^  -|^\w|\Z)", text, re.S | re.M)
        assert flags and all(re.search(r"\s{2,}\S.*\w{2}", flag) for flag in flags), flags
        assert all("(default:" in flag for flag in flags if re.match(r"\S+ \S", flag)), flags
        assert {"train_vae": "(default: 1024)", "train_sit": "(default: 256)"}.get(script, "") in text
        with pytest.raises(SystemExit) as stop:
            module.parse_args([*command, "--no-such-flag"])
        assert stop.value.code == 2
