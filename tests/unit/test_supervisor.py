"""Why a server ended, by its log."""

from pathlib import Path

import pytest

from opd.distributed.supervisor import keep_log, reason_of

TAKEN = "(APIServer pid=7) INFO 11-23 10:00:00 [api.py:1] Loading"


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        # an argument that does not fit the model: the reason stands in the second of three lines
        (
            [
                "(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "(APIServer pid=7)   Value error, User-specified max_model_len (9) is greater than 8. [type=value_error]",
                "(APIServer pid=7)     For further information visit https://errors.pydantic.dev/2/v/value_error",
            ],
            1,
            "Value error, User-specified max_model_len (9) is greater than 8. [type=value_error]",
        ),
        (
            [
                "(EngineCore pid=8) ERROR 11-23 10:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory.",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
                "ImportError: sys.meta_path is None, Python is likely shutting down",
            ],
            1,
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (["usage: vllm", "vllm: error: unrecognized arguments: --x"], 2, "error: unrecognized arguments: --x"),
        (["  File x, line 3", "    assert size", "AssertionError"], 1, "AssertionError"),
        ([TAKEN, "OSError: " + "x" * 400], 1, "OSError: " + "x" * 291),
        # an error that was dealt with is no reason
        (
            ["WARNING 11-23 [x.py:1] slower without it: ImportError: no flash_attn", TAKEN],
            247,
            f"SIGKILL ended it, as when main memory is full; its last log line: {TAKEN}",
        ),
        ([], 250, "SIGABRT ended it; its log is empty"),
        ([TAKEN], 3, f"its last log line: {TAKEN}"),
        ([], 0, "its log is empty"),
    ],
)
def test_the_reason_is_the_last_error_in_the_log_or_else_the_signal(
    tmp_path: Path, lines: list[str], code: int, said: str
):
    log = tmp_path / "server.log"
    log.write_text("ValueError: of an earlier start\n" + "\n".join(lines))
    assert reason_of(log, len("ValueError: of an earlier start\n"), code) == said


def test_a_log_outlives_its_folder(tmp_path: Path):
    log = tmp_path / "server.log"
    log.write_text("all of it")
    place = Path(keep_log(log).removeprefix("its whole log: ").rpartition(" on ")[0])
    log.unlink()
    assert place.read_text() == "all of it"
    place.unlink()
    assert keep_log(log) == "its log could not be kept (No such file or directory)"
