"""The function's package: what a function loads and nothing else, as a folder, or as a zip for AWS Lambda.

Images and zip are made by this one recipe. It needs Python and pip only, so that an image can begin with it:

    python -m infra.package FOLDER [--extra function-cpu|function-gpu] [--python 3.11] [--measure]
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import py_compile
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from schemas.errors import DeployError
from schemas.manifest import ENCODER_PATH, MANIFEST_FILE

ROOT = Path(__file__).parents[1]
CPU, GPU = "function-cpu", "function-gpu"
OURS = ("schemas", "inference")
BAKED = "artifacts"
"""Where below a package the model and the encoder lie that it was made with."""
LAMBDA_PYTHON = "3.12"
"""Lambda's 3.11 runs on a glibc that is too old for ONNX Runtime's wheels."""
LAMBDA_UNZIPPED_BYTES = 250 * 1024**2
"""What Lambda takes unpacked; an image may have 10 GB."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
_SOURCES = ("*.py", "*.sql", "*.toml", "*.html", "*.css", "*.js", "*.svg")

# `tokenizers` asks for these to fetch files from the model hub; a function is given its files and has no business there.
HUB_ONLY = ("huggingface_hub", "hf_xet", "fsspec", "filelock", "tqdm", "PyYAML")
# Of AWS's 400 services a function speaks to the one that holds artefacts, and to those that give it credentials.
BOTO_SERVICES = ("s3", "sts", "sso", "sso-oidc")
# Parts of libraries that only build, convert or test.
UNUSED_FOLDERS = (
    "onnxruntime/transformers",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/datasets",
    "onnxruntime/backend",
    "numpy/f2py",
    "numpy/_pyinstaller",
    "bin",
)


def requirements(extra: str) -> list[str]:
    """What the extra `extra` of pyproject.toml asks for, extras of our own resolved, and the base dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if extra not in extras:
        raise DeployError(f"pyproject.toml has no extra {extra!r}; a function is made of {CPU} or {GPU}")
    found: list[str] = list(project["dependencies"])
    waiting = list(extras[extra])
    while waiting:
        one = waiting.pop(0)
        ours = re.fullmatch(rf"{project['name']}\[([\w-]+)\]", one.strip())
        if ours:
            waiting = [*extras[ours[1]], *waiting]
        else:
            found.append(one)
    return found


def build(folder: Path, extra: str = CPU, python: str = LAMBDA_PYTHON, artifacts: Path | None = None) -> None:
    """Fill `folder`, which must be empty or missing, with a package for Linux on x86-64 and `python`.

    `artifacts` is a folder laid out as below ARTIFACTS_URL (`models/…`, `encoders/…`) that goes in as it is.
    Raises DeployError if pip cannot install what is pinned.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DeployError(f"{folder} is not empty; name an empty folder for the package, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--target", str(folder), "--only-binary", ":all:", "--python-version", python]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    command += ["--constraint", str(ROOT / "constraints.txt"), *requirements(extra)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise DeployError(f"pip could not install the function's packages ({' '.join(lines)}); see constraints.txt")
    trim(folder)
    _copy_ours(folder)
    if python == f"{sys.version_info[0]}.{sys.version_info[1]}":
        # Where it runs it cannot keep what it compiles, and would compile at every start. Only the same Python can do it here.
        compileall.compile_dir(
            folder, quiet=2, stripdir=folder, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
    if artifacts is not None:
        shutil.copytree(artifacts, folder / BAKED)


def trim(folder: Path) -> None:
    """Take out of an installed package what no function loads; see `HUB_ONLY`, `BOTO_SERVICES` and `UNUSED_FOLDERS`."""
    for name in HUB_ONLY:
        for record in folder.glob(f"{name.lower()}-*.dist-info/RECORD"):
            for line in record.read_text(encoding="utf-8").splitlines():
                (folder / line.split(",")[0]).unlink(missing_ok=True)
            shutil.rmtree(record.parent, ignore_errors=True)
    for name in UNUSED_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for tests in [*folder.glob("numpy/**/tests"), *folder.glob("**/__pycache__")]:
        shutil.rmtree(tests, ignore_errors=True)
    for service in (folder / "botocore" / "data").glob("*/"):
        if service.name not in BOTO_SERVICES:
            shutil.rmtree(service)
    for empty in sorted((entry for entry in folder.rglob("*") if entry.is_dir()), reverse=True):
        if not any(empty.iterdir()):
            empty.rmdir()


def gather(target: Path, model_path: str, model: Path, encoder: Path | None) -> None:
    """Lay out in `target`, as below ARTIFACTS_URL, what a function reads: one model, and the encoder for wishes.

    The encoder's float graph stays behind: it makes item vectors, which is no function's work.
    """
    shutil.copytree(model, target / model_path, dirs_exist_ok=True)
    if encoder is not None:
        unused = shutil.ignore_patterns("encoder.fp32.onnx")
        shutil.copytree(encoder, target / ENCODER_PATH, dirs_exist_ok=True, ignore=unused)


def key(extra: str, python: str, artifacts: Path | None) -> str:
    """Hash (16 hex digits) of all that goes into a package: pins, sources, this recipe, model and encoder."""
    digest = hashlib.sha256(json.dumps([requirements(extra), python, *_PLATFORMS]).encode())
    for file in [ROOT / "constraints.txt", Path(__file__), *_ours()]:
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    for file in sorted(artifacts.rglob("*")) if artifacts else ():
        # A manifest names every file beside it with its hash.
        if file.name in (MANIFEST_FILE, "encoder.json"):
            digest.update(
                f"{file.relative_to(artifacts or file)}\0".encode() + hashlib.sha256(file.read_bytes()).digest()
            )
    return digest.hexdigest()[:16]


def size_bytes(folder: Path) -> int:
    """The sizes of all files in `folder`, added up."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def make_zip(folder: Path, file: Path) -> None:
    """`folder` as a zip whose bytes depend on nothing but the folder's. Raises DeployError if Lambda would refuse it."""
    size = size_bytes(folder)
    if size > LAMBDA_UNZIPPED_BYTES:
        raise DeployError(
            f"the package has {size / 1024**2:.0f} MiB and Lambda takes {LAMBDA_UNZIPPED_BYTES / 1024**2:.0f} MiB as a zip; "
            "build infra/images/function-cpu.Dockerfile and set LARDER_IMAGE to its digest"
        )
    partial = file.with_name(f".{file.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as packed:
        for entry in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(entry.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with entry.open("rb") as source, packed.open(info, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    partial.replace(file)


def _ours() -> Iterable[Path]:
    for name in OURS:
        for pattern in _SOURCES:
            yield from sorted(file for file in (ROOT / name).rglob(pattern) if "migrations" not in file.parts)


def _copy_ours(folder: Path) -> None:
    for file in _ours():
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / f"{project['name']}-{project['version']}.dist-info"
    about.mkdir()
    # `/health` and spans say which version answers.
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.package", description="Make the function's package.")
    parser.add_argument("folder", type=Path, help="an empty folder for it")
    parser.add_argument("--extra", choices=[CPU, GPU], default=CPU)
    parser.add_argument(
        "--python", default=LAMBDA_PYTHON, help="Python that will run it (default: %(default)s, Lambda's)"
    )
    parser.add_argument("--artifacts", type=Path, help="a folder laid out as ARTIFACTS_URL, to go in")
    parser.add_argument("--measure", action="store_true", help="end with one JSON object: function_size_bytes")
    options = parser.parse_args(arguments)
    try:
        build(options.folder, options.extra, options.python, options.artifacts)
    except DeployError as error:
        print(f"error ({error.type}): {error}", file=sys.stderr)
        return 1
    parts = sorted(
        ((size_bytes(entry), entry.name) for entry in options.folder.iterdir() if entry.is_dir()), reverse=True
    )
    for size, name in parts[:12]:
        print(f"{size / 1e6:8.1f} MB  {name}")
    total = size_bytes(options.folder)
    print(f"{total / 1e6:8.1f} MB  in all")
    if options.measure:
        print(json.dumps({"extra": options.extra, "python": options.python, "function_size_bytes": total}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
