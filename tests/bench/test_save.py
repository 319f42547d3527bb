"""The benchmark of saves measures both sides."""

import pytest

from thinkpo_jax.bench.save import bench_save


def test_a_save_and_its_digests_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_save(0.001, repeats=2)
    assert len(result["rounds"]) == 2
    assert all(each["save"] > 0 and each["digests"] > 0 for each in result["rounds"])
    assert f"median digests / save: {result['ratio']:.3f}" in capsys.readouterr().out
