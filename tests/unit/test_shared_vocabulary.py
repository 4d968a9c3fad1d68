"""What two vocabularies have in common, and the loss over it: laws, a dense version, and a batch with both kinds of teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benches import random_case
from factories import toy_recipe
from templated import save_cross_tokenizer
from torch import Tensor
from zoo import toy, toy_ascii, toy_bpe

import opd
from opd.batch import pack
from opd.data.tasks import make_tasks
from opd.errors import ModelError
from opd.local.build import build
from opd.metrics import values
from opd.objective import compute_advantages
from opd.objectives.vocabulary import SharedVocabularyIds, TeacherStates, VocabularyLoss, vocabulary_loss
from opd.records import ChunkScore
from opd.text.student_text import StudentSide
from opd.text.teacher_text import TeacherSide
from opd.text.tokenizer import SharedVocabulary, shared_vocabulary


def cells_of(student, teacher) -> tuple[SharedVocabulary, StudentSide, StudentSide]:
    ours, theirs = StudentSide(student), StudentSide(teacher)
    return shared_vocabulary(ours.table, ours.end_ids, theirs.table, theirs.end_ids), ours, theirs


def test_a_token_lies_in_the_cell_of_its_longest_common_beginning():
    cells, ours, theirs = cells_of(toy_ascii(("x", "y"), ("w", "v")), toy_ascii(("x", "y"), ("xy", "z")))

    def student(token: str) -> int:
        return int(cells.student[ours.tokenizer.convert_tokens_to_ids(token)])

    def teacher(token: str) -> int:
        return int(cells.teacher[theirs.tokenizer.convert_tokens_to_ids(token)])

    assert student("xy") == teacher("xy") == teacher("xyz")
    assert student("wv") == teacher("w") == student("w")
    assert student("<|im_end|>") == teacher("<|im_end|>") == cells.num - 2
    assert student("x") != student("xy")


@pytest.mark.parametrize(("first", "second"), [("bytes", "bpe400"), ("bpe300", "bpe400"), ("bpe400", "bpe400")])
def test_tokens_that_both_have_are_cells_of_their_own(first: str, second: str):
    cells, ours, theirs = cells_of(toy(first), toy(second))
    for table, found, whole in (
        (ours.table, cells.student, cells.student_whole),
        (theirs.table, cells.teacher, cells.teacher_whole),
    ):
        spelled: dict[int, set[bytes]] = {}
        for index in np.flatnonzero(whole):
            spelled.setdefault(int(found[index]), set()).add(table.of(int(index)))
        assert set(spelled) >= set(range(cells.num - 2))
        for cell, every in spelled.items():
            if cell < cells.num - 2:
                [only] = every
                inside = [table.of(int(i)) for i in np.flatnonzero(found == cell)]
                assert all(raw.startswith(only) for raw in inside)
    if first == second:
        assert cells.same(np.arange(len(ours.table)), np.arange(len(ours.table))).sum() == cells.num - 2 + 1


def dense(
    hidden: Tensor, head: Tensor, teacher: Tensor, theirs: Tensor, cells: SharedVocabularyIds, k: int, sampled: Tensor
):
    """The bucketed reverse KL over cells, state by state, with autograd."""
    total = hidden.new_zeros(())
    for i in range(len(hidden)):
        p, q = (hidden[i] @ head.T).softmax(-1), (teacher[i] @ theirs.T).softmax(-1)
        ours = [p[cells.student == c].sum() for c in range(cells.num)]
        other = [q[cells.teacher == c].sum() for c in range(cells.num)]
        inside = {c for side in (ours, other) for c in torch.stack(side[:-1]).topk(k).indices.tolist()}
        inside = (inside | {int(cells.student[sampled[i]])}) - {cells.num - 1}
        for c in inside:
            total = total + ours[c] * (ours[c].log() - other[c].log().clamp(min=-50.0))
        off = [c for c in range(cells.num) if c not in inside]
        tail, theirs_off = torch.stack([ours[c] for c in off]).sum(), torch.stack([other[c] for c in off]).sum()
        total = total + tail * (tail.log() - theirs_off.log())
    return total


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_loss_over_cells_equals_a_dense_one(k: int):
    hidden, head, teacher, theirs, cells = random_case()
    sampled = torch.tensor([0, 5, 7, 9, 2])
    how = VocabularyLoss(top_k=k, max_logits=30)
    weights = torch.ones(5, dtype=torch.float64)
    loss, stats = vocabulary_loss(
        hidden, head, [TeacherStates(teacher, theirs, 1.0, cells)], weights, how, sampled_ids=sampled
    )
    wanted = dense(hidden, head, teacher, theirs, cells, k, sampled)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
    ours = torch.autograd.grad(loss, (hidden, head))
    for mine, plain in zip(ours, torch.autograd.grad(wanted, (hidden, head)), strict=True):
        assert torch.allclose(mine, plain, atol=1e-12)
    p = (hidden @ head.T).softmax(-1)
    assert torch.allclose(stats.entropy, -(p * p.log()).sum(-1))


def test_one_vocabulary_gives_what_ids_give():
    """SharedVocabulary of one id each are the plain support."""
    hidden, head, teacher, theirs, _ = random_case()
    theirs = theirs[:11]
    how = VocabularyLoss(top_k=3)
    sampled = torch.tensor([0, 5, 7, 9, 2])
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    each = SharedVocabularyIds(torch.arange(11), torch.arange(11), 12)
    found = []
    for cells in (None, each):
        states = [TeacherStates(teacher, theirs, 1.0, cells)]
        loss, _ = vocabulary_loss(hidden, head, states, weights, how, sampled_ids=sampled)
        found.append((loss, *torch.autograd.grad(loss, (hidden, head))))
    for plain, in_cells in zip(*found, strict=True):
        assert torch.allclose(plain, in_cells, atol=1e-12)


def test_a_cell_without_mass_is_no_infinity():
    hidden, head, teacher, theirs, cells = random_case()
    head = (head.detach() * 2000).requires_grad_()
    loss, _ = vocabulary_loss(
        hidden, head, [TeacherStates(teacher, theirs * 2000, 1.0, cells)], torch.ones(5, dtype=torch.float64),
        VocabularyLoss(top_k=2), sampled_ids=torch.zeros(5, dtype=torch.int64),
    )  # fmt: skip
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, head)))


def cross_tokenizer_recipe(folder: Path, **changes) -> dict:
    """A student of letters; one teacher of the same letters, one that merges them."""
    merges = [(a, b) for a in "aeiou" for b in "nrst"]
    tree = toy_recipe(folder, **changes)
    tree["student"] = save_cross_tokenizer(folder / "ascii", toy_ascii(), seed=4)
    tree["teachers"] = {
        "even": {"model": save_cross_tokenizer(folder / "merged", toy_ascii(*merges), seed=5)},
        "odd": {"model": save_cross_tokenizer(folder / "same", toy_ascii(), seed=6)},
    }
    return tree


def test_a_tag_of_both_is_a_cell_of_its_own_under_any_spelling():
    ours, theirs = toy_bpe(300), toy_bpe(330)
    ours.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    theirs.add_tokens(["[THINK]", "[/THINK]"])  # ordinary text to the teacher
    student_side, teacher_side = StudentSide(ours), TeacherSide(theirs, name="t")
    tags = teacher_side.counterparts(student_side.table)
    cells = shared_vocabulary(student_side.table, student_side.end_ids, teacher_side.table, teacher_side.end_ids, tags)
    mine, other = (
        ours.convert_tokens_to_ids(["<think>", "</think>"]),
        theirs.convert_tokens_to_ids(["[THINK]", "[/THINK]"]),
    )
    assert cells.student[mine].tolist() == cells.teacher[other].tolist() == [cells.num - 4, cells.num - 3]
    assert cells.same(np.array(mine), np.array(other)).all()
    assert (cells.student == cells.num - 4).sum() == (cells.teacher == cells.num - 4).sum() == 1


def packed_case(folder: Path, max_tokens: int):
    """(backend, scored rollouts, followed batch) of both kinds of teacher, scored in passes of `max_tokens`."""
    tree = cross_tokenizer_recipe(folder, objective={"type": "top_k", "top_k": 8})
    tree["compute"] = {"device": "cpu", "threads": 1, "max_tokens": max_tokens}
    config = opd.parse_config(tree)
    backend = build(config)
    prompts = [p for task in make_tasks(config.tasks).values() for p in task.prompts("train")][:6]
    rollouts = backend.sampler().sample(prompts, num_samples=2, seed=(1,))
    scored = backend.teachers(keep_hidden=True, followed=True).score(rollouts)
    batch, _ = compute_advantages(config, pack(scored, logprob_floor=-50.0)[0])
    return backend, scored, batch


def test_the_states_that_are_compared_are_those_before_the_same_token(tmp_path: Path):
    """Each row against one unpacked forward pass over the teacher's own encoding of its own rendering."""
    backend, scored, _ = packed_case(tmp_path, 60)
    policy = backend.cross_tokenizer["even"]
    checked = 0
    for item in scored:
        said = [int(i) for i in item.rollout.token_ids[item.rollout.loss_mask] if i not in policy.student_side.end_ids]
        if not isinstance(item.score, ChunkScore) or policy.student_side.table.control[said].any():
            continue  # a tag is the teacher's own token, which a plain encoding of the response does not have
        assert item.score.part is not None
        assert item.score.compared is not None
        before = policy.teacher_side.render(item.rollout.prompt.messages).text
        ids = policy.teacher_side.tokenizer(before + item.rollout.response, add_special_tokens=False).input_ids
        first = len(policy.teacher_side.tokenizer(before, add_special_tokens=False).input_ids)
        with torch.no_grad():
            states = policy.network.base.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        ends = np.cumsum([len(policy.teacher_side.table.of(i)) for i in ids[first:]])
        start = int(np.flatnonzero(item.rollout.loss_mask)[0])
        mine = np.cumsum([len(policy.student_side.table.of(int(i))) for i in item.rollout.token_ids[start:]])
        for place, row in zip(np.flatnonzero(item.score.compared), item.score.part.hidden, strict=True):
            token = int(item.rollout.token_ids[place])
            at_end = token in policy.student_side.end_ids
            # the teacher's token that ends at the same byte; behind the last one where the turn ends
            j = len(ends) if at_end else int(np.flatnonzero(ends == mine[place - start])[0])
            assert row == pytest.approx(states[first + j - 1].numpy(), abs=1e-4)
            checked += 1
    assert checked > 5


def test_any_packing_gives_the_same_gradient_and_the_same_share(tmp_path: Path):
    backend, _, batch = packed_case(tmp_path, 4000)
    cross_tokenizer = torch.tensor([t == "even" for t in batch.teachers]).repeat_interleave(batch.lengths)
    assert batch.compared is not None
    share = float((batch.compared & cross_tokenizer).sum() / (batch.scored & cross_tokenizer).sum())
    found = []
    for max_tokens in (4000, 40):
        learner = backend.learner()
        learner._max_tokens = max_tokens
        metrics = values(learner.forward_backward(batch))
        assert metrics["top_k/compared/mean"] == pytest.approx(share)
        found.append({n: p.grad.clone() for n, p in learner.weights().items() if p.grad is not None})
        for parameter in learner.weights().values():
            parameter.grad = None
    for name, whole in found[0].items():
        assert torch.allclose(whole, found[1][name], atol=1e-4), name


def test_masking_format_errors_needs_a_centred_term(tmp_path: Path):
    tree = cross_tokenizer_recipe(tmp_path, objective={"type": "top_k"}, mask={"format_errors": "trajectory"})
    for task in tree["tasks"].values():
        task["checks"] = {"rules": ["truncated"]}
    with pytest.raises(ModelError, match="would reward errors"):
        build(opd.parse_config(tree))


def test_a_batch_of_both_kinds_of_teacher(tmp_path: Path):
    """What is compared, what follows the sampled chunk, and that together they are every scored action, once."""
    objective = {"type": "top_k", "top_k": 8}
    config = opd.parse_config(cross_tokenizer_recipe(tmp_path, objective=objective))
    backend = build(config)
    prompts = [p for task in make_tasks(config.tasks).values() for p in task.prompts("train")][:6]
    rollouts = backend.sampler().sample(prompts, num_samples=2, seed=(1,))
    scored = backend.teachers(keep_hidden=True, followed=True).score(rollouts)
    batch, _ = pack(scored, logprob_floor=-50.0)
    batch, _ = compute_advantages(config, batch)
    assert batch.compared is not None
    assert batch.advantages is not None
    cross_tokenizer = [s for s in scored if isinstance(s.score, ChunkScore)]
    assert cross_tokenizer
    for item in cross_tokenizer:
        assert isinstance(item.score, ChunkScore)
        assert item.score.compared is not None
        assert (item.score.chunks[item.score.compared] >= 0).all()
    assert 0 < batch.compared.sum() < batch.scored.sum()
    assert not batch.compared[~batch.scored].any()
    assert (batch.advantages[batch.compared] == 0).all()
    rest = batch.scored & ~batch.compared
    assert (batch.advantages[rest] != 0).any()
    learner = backend.learner()
    metrics = values(learner.forward_backward(batch))
    assert 0 < metrics["top_k/compared/mean"] < 1
    assert metrics["kl/byte/mean"] > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learner.weights().values())


def test_a_tail_residual_needs_one_vocabulary(tmp_path: Path):
    objective = {"type": "top_k", "top_k": 8, "tail_residual": True}
    config = opd.parse_config(cross_tokenizer_recipe(tmp_path, objective=objective))
    with pytest.raises(ModelError, match="tail_residual"):
        build(config)
