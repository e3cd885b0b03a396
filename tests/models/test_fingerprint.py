"""Files of one model on several hosts are compared without reading all of them."""

import torch
from safetensors.torch import save_file

from longspan.models.fingerprint import SAMPLE_BYTES, fingerprint, tensor_fingerprint


def test_a_fingerprint_tells_configs_sizes_headers_and_blocks_apart(tmp_path):
    def write(config=b"{}", header=b'{"a":1}', body=bytes(10 * SAMPLE_BYTES)):
        (tmp_path / "config.json").write_bytes(config)
        data = len(header).to_bytes(8, "little") + header + body
        (tmp_path / "model.safetensors").write_bytes(data)
        return fingerprint(tmp_path)

    changed = bytearray(10 * SAMPLE_BYTES)
    changed[-1] = 1
    same = [write(), write()]
    others = [write(config=b"{ }"), write(header=b'{"a":2}'), write(body=bytes(9 * SAMPLE_BYTES)), write(body=changed)]
    assert len({*same, *others}) == 5


def test_every_tensor_counts_for_files_of_keys_and_values(tmp_path):
    """Also a small one in a large file, which evenly spaced blocks may miss."""
    tensors = {f"layer{i}": torch.full((1000,), float(i)) for i in range(200)}
    found = {tensor_fingerprint(tmp_path)}
    for changed in (None, "layer0", "layer77", "layer199"):
        tensors |= {} if changed is None else {changed: torch.ones(1000) * 0.5}
        save_file(tensors, tmp_path / "model.safetensors")
        found.add(tensor_fingerprint(tmp_path))
    found.add(tensor_fingerprint(tmp_path, None))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.ones(3)}, adapter / "adapter.safetensors")
    found.add(tensor_fingerprint(tmp_path, adapter))
    assert len(found) == 6
