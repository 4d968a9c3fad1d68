"""Prompts that a teacher cannot read in its own template are named before the first step, with the true cause."""

import json
import re
from pathlib import Path

import pytest
from templated import CHATTY, NO_SYSTEM, TERSE, own_templates

import opd
from opd.errors import CheckError, DataError


@pytest.mark.parametrize("other_end", [False, True], ids=["the student's tokens", "compared by text"])
def test_a_prompt_that_is_too_long_in_its_teachers_template_is_refused_before_the_first_step(
    tmp_path: Path, other_end: bool
):
    long = CHATTY.replace("Answer in full.", "Answer in full. " * 20)
    long = long.replace("<|im_end|>", "<|turn_end|>") if other_end else long
    tree = own_templates(tmp_path, TERSE, long, objective={"type": "immediate"})
    with pytest.raises(
        DataError, match=r"prompt 'first:0': teacher 'even' reads it as 3\d\d tokens .* teacher \(256\)"
    ):
        opd.train(opd.parse_config(tree))


@pytest.mark.parametrize("other_end", [False, True], ids=["the student's tokens", "compared by text"])
@pytest.mark.parametrize("refusing", ["every teacher", "one of two"])
def test_a_teacher_whose_template_refuses_every_prompt_fails_the_check_with_that_reason(
    tmp_path: Path, refusing: str, other_end: bool
):
    strict = NO_SYSTEM.replace("<|im_end|>", "<|turn_end|>") if other_end else NO_SYSTEM
    tree = own_templates(tmp_path, TERSE, strict, objective={"type": "immediate"})
    for task in ("first", "second") if refusing == "every teacher" else ("second",):
        path = Path(tree["tasks"][task]["path"])
        said = [json.loads(line) for line in path.read_text().splitlines()]
        for record in said:
            record["messages"] = [{"role": "system", "content": "s"}, {"role": "user", "content": record.pop("prompt")}]
        path.write_text("\n".join(map(json.dumps, said)) + "\n")
    who = "even" if refusing == "every teacher" else "odd"
    with pytest.raises(CheckError) as caught:
        opd.train(opd.parse_config(tree))
    said = str(caught.value)
    assert said.startswith(
        f"start-up check 'teacher '{who}' can score what the student writes' failed: none of 2 rollouts"
    )
    assert f"teacher '{who}': " in said
    assert re.search(r"chat template (of '.*' )?refuses", said)
    assert said.endswith("no system message here)")
