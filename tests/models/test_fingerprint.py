"""Files of one model on several hosts are compared without reading all of them."""

from longspan.models.fingerprint import SAMPLE_BYTES, fingerprint


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
