"""GGUF files as model directories: found, checked, converted once, and kept in the user's cache directory.

Holds the parts of a split file, what is refused by name, and the conversion by Transformers' own loader of GGUF files,
which dequantises all weights. Must not know how a model directory is used.
Read next: `longspan.models.gguf_metadata`, what a file says of its model; `longspan.models.gguf_tokenizer`;
`longspan.models.smollm2`, a model that comes as such a file.

Note [What becomes of a GGUF file]
    A file of 0.1 GB with 134 million weights in 4 bits becomes a directory with 0.5 GB of float32, which is exactly
    what the file's blocks mean. The directory is made once per file and version of Transformers; ranks of one machine
    then map its weights, and share them in memory, as those of any other directory.
"""

import contextlib
import hashlib
import io
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from longspan.errors import ConfigError, LongspanError
from longspan.models import gguf_metadata, gguf_sentencepiece, gguf_tokenizer
from longspan.models.gguf_metadata import Metadata
from longspan.models.model_cache import cache_path, draft_of
from longspan.models.names import GGUF_SUFFIX

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = GGUF_SUFFIX

EXTRA = "gguf"
"""Extra of this package with what reads GGUF files."""

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_HEAD_BYTES = 2**20
"""Bytes of a file that its fingerprint covers, beside its size and time of change."""


def gguf_path(file: Path) -> Path:
    """Return the model directory of a GGUF file; convert the file on first use.

    Args:
        file: the file, or the first part of a split one (`NAME-00001-of-00003.gguf`).

    Raises:
        ConfigError: a part is missing, a package is missing, or the file is not proven; the message names what.
    """
    parts = find_parts(file)
    digest = hashlib.sha256(converter_digest().encode())
    for part in parts:
        status = part.stat()
        digest.update(f"{part.name} {status.st_size} {status.st_mtime_ns}".encode())
        with part.open("rb") as opened:
            digest.update(opened.read(_HEAD_BYTES))
    path = cache_path(f"gguf-{file.stem}-{digest.hexdigest()[:12]}")
    if not is_complete(path):
        convert(parts, path)
    return path


def find_parts(file: Path) -> list[Path]:
    """Return all parts of a file, itself alone if it is whole.

    Raises:
        ConfigError: it is not the first part, or another one is missing.
    """
    named = _PART.fullmatch(file.name)
    if named is None:
        return [file]
    count = int(named["count"])
    parts = [file.with_name(f"{named['stem']}-{number:05}-of-{named['count']}.gguf") for number in range(1, count + 1)]
    if int(named["number"]) != 1:
        raise ConfigError(f"model: got part {int(named['number'])} of {count}, legal is the first, {parts[0].name}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ConfigError(f"model: got {str(file)!r}, legal is a file all of whose parts are there: no {missing[0]}")
    return parts


def converter_digest() -> str:
    """Digest of what makes directories of files: the source here, and the version of Transformers."""
    modules = (sys.modules[__name__], gguf_metadata, gguf_sentencepiece, gguf_tokenizer)
    sources = [Path(module.__file__ or "") for module in modules]
    version = transformers.__version__.encode()
    return hashlib.sha256(version + b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def is_complete(path: Path) -> bool:
    """Whether a directory has all files of a model."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return all((path / name).is_file() for name in names) and any(path.glob("*.safetensors"))


def convert(parts: Sequence[Path], path: Path) -> None:
    """Convert a file to a model directory, and say on standard error what that takes.

    Args:
        parts: the file, or all parts of a split one.
        path: the directory; it appears complete or not at all.

    Raises:
        ConfigError: see `gguf_path`.
    """
    check_packages()
    name = parts[0].name
    try:
        with draft_of(path) as draft:
            # A directory of its own: what lies beside the file, such as another tokenizer, must not be read.
            source = draft / "source"
            source.mkdir()
            whole = source / f"model{SUFFIX}"
            if len(parts) == 1:
                whole.symlink_to(parts[0].resolve())
            else:
                _join(parts, whole)
            _convert_whole(whole, draft, name)
            shutil.rmtree(source)
    except (LongspanError, OSError):
        raise
    except Exception as error:  # broken files fail wherever they are read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model: got {name!r}, legal is a GGUF file that can be read: {reason[:300]}") from error


def check_packages() -> None:
    """Refuse where the packages that read GGUF files are not installed.

    Raises:
        ConfigError: says what to install.
    """
    try:
        import accelerate  # noqa: F401  (Transformers asks for it)
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model: got a GGUF file, which needs the package {error.name}; install it with "
            f"pip install 'longspan[{EXTRA}]'"
        ) from None


def _join(parts: Sequence[Path], whole: Path) -> None:
    """Write one file with the metadata of the first part and the tensors of all of them."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(part) for part in parts]
    metadata = Metadata(readers[0])
    writer = GGUFWriter(whole, metadata.architecture)  # which states the architecture
    for field in readers[0].fields.values():
        if not field.name.startswith(("GGUF.", "split.")) and field.name != gguf_metadata.ARCHITECTURE:
            is_array = field.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(
                field.name, field.contents(), field.types[0], sub_type=field.types[-1] if is_array else None
            )
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def _convert_whole(whole: Path, draft: Path, name: str) -> None:
    """Write the files of a model directory, from a GGUF file that is alone in its own directory."""
    from gguf import GGUFReader

    reader = GGUFReader(whole)
    metadata = Metadata(reader)
    metadata.check_architecture()
    metadata.check_types()
    gguf_tokenizer.check_tokenizer(metadata)
    num_weights = sum(int(tensor.n_elements) for tensor in metadata.weights())
    _announce(reader, name, num_weights, draft)
    given: dict[str, Any] = {"gguf_file": whole.name, "local_files_only": True}
    config = metadata.complete(AutoConfig.from_pretrained(whole.parent, **given))
    tokenizer = AutoTokenizer.from_pretrained(whole.parent, **given)
    gguf_tokenizer.correct_(tokenizer, metadata)
    with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # progress bars
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(
            whole.parent, config=config, dtype=torch.float32, output_loading_info=True, **_dequantize(), **given
        )
        _check_weights(name, num_weights, model.state_dict(), sorted(info["missing_keys"]))
        if hasattr(model.config, "quantization_config"):  # nothing is quantised any more
            del model.config.quantization_config
        model.save_pretrained(draft)
    ids = {field: getattr(config, field) for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(draft)
    tokenizer.save_pretrained(str(draft))
    for file in draft.glob("*.safetensors"):
        file.chmod(0o644)  # it was made for its owner alone


def _check_weights(name: str, num_weights: int, weights: Mapping[str, Tensor], missing: Sequence[str]) -> None:
    """Refuse a file of which Transformers left weights out, or that lacks some."""
    num_loaded = sum({weight.data_ptr(): weight.numel() for weight in weights.values()}.values())  # tied ones once
    if missing or num_loaded != num_weights:
        raise ConfigError(
            f"model: got {name!r} with {num_weights} weights, for a model that has {num_loaded} in Transformers "
            f"{transformers.__version__} (missing: {missing[0] if missing else 'none'}); legal is a file that it reads "
            "as a whole"
        )


def _dequantize() -> dict[str, Any]:
    """Arguments with which Transformers keeps no blocks; older versions never do."""
    known = getattr(transformers, "GgufConfig", None)
    return {} if known is None else {"quantization_config": known(dequantize=True)}


def _announce(reader: "GGUFReader", name: str, num_weights: int, draft: Path) -> None:
    """Say what the conversion costs, and refuse one that the disk cannot hold."""
    num_bytes = num_weights * torch.float32.itemsize
    free = shutil.disk_usage(draft).free
    if num_bytes > free:
        raise ConfigError(
            f"model: got {name!r}, which takes {num_bytes / 1e9:.2f} GB as float32, legal is what fits into "
            f"{draft.parent} ({free / 1e9:.2f} GB free; XDG_CACHE_HOME names another place)"
        )
    stored = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1})
    print(
        f"longspan: {name}: {stored / 1e9:.2f} GB in {', '.join(kinds)} are dequantised once to {num_bytes / 1e9:.2f} "
        f"GB of float32 in {draft.parent}; in memory weights take that, or half of it in bfloat16",
        file=sys.stderr,
        flush=True,
    )
