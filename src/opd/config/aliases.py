"""What opd calls the keys of TRL, verl, PEFT and transformers. An unknown key with such a name is answered, not accepted.

A new name is one word in `_ALIASES`, and a new answer is one row.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple


class Alias(NamedTuple):
    """names: of other libraries. write: overrides that do the same in opd, or "" where opd has nothing like it.

    note: the difference; without one the value of the other library is right for opd too.
    """

    names: str
    write: str
    note: str = ""

    @property
    def overrides(self) -> list[str]:
        return shlex.split(self.write)


_ALIASES = """
# optimizer
lr learning_rate | optimizer.lr=1e-5
lr_scheduler_type lr_scheduler warmup_style | optimizer.schedule=cosine
lr_warmup_steps num_warmup_steps | optimizer.warmup_steps=5
warmup_ratio lr_warmup_steps_ratio | optimizer.warmup_steps=5 | opd counts steps, not a fraction of the run
grad_clip clip_grad gradient_clipping max_norm | optimizer.max_grad_norm=1.0
adam_beta1 adam_beta2 | 'optimizer.betas=[0.9, 0.95]' | opd takes both betas in one list
adam_epsilon | optimizer.eps=1e-8
# size of a step, first for training, then for fine-tuning
batch_size train_batch_size per_device_train_batch_size generation_batch_size | sampling.prompts_per_step=32
    | a step of all devices has sampling.prompts_per_step prompts, each with sampling.group_size responses
train_batch_size per_device_train_batch_size | batch_size=32 | a step of all devices has batch_size examples
gradient_accumulation_steps micro_batch_size micro_batch_size_per_gpu ppo_micro_batch_size ppo_micro_batch_size_per_gpu
    mini_batch_size ppo_mini_batch_size
    | compute.max_tokens=2048 | a step is one update, in passes of at most compute.max_tokens tokens
max_steps total_training_steps num_steps | steps=100
num_train_epochs num_epochs total_epochs | steps=100 | opd counts updates, not passes over the data
# sampling
num_generations rollout.n num_samples | sampling.group_size=4
max_completion_length max_response_length response_length max_tokens | sampling.max_new_tokens=256
max_completion_length max_response_length response_length | max_new_tokens=64
max_prompt_length max_length max_seq_length max_model_len | sampling.max_new_tokens=256
    | opd never cuts a prompt, and refuses one that exceeds a model's context; only responses have a limit
top_p min_p repetition_penalty | sampling.top_p=1.0 | opd samples the whole distribution, which it also scores
do_sample | temperature=1.0 | opd always samples
# chat templates
chat_template_kwargs apply_chat_template_kwargs data.apply_chat_template_kwargs enable_thinking
    | chat.template_args.enable_thinking=false
# models
model model_path model_name model_name_or_path model.path | student=Qwen/Qwen3-1.7B
teacher_model teacher_model_name_or_path teacher_path | teachers.teacher.model=Qwen/Qwen3-8B
    | every teacher has a name in [teachers]
lora.r lora_r lora_rank r | lora.rank=16
lora_alpha | lora.alpha=32
lora_target_modules | lora.target_modules=all-linear
lora_dropout lora.dropout |  | opd trains adapters without dropout
use_peft use_lora | trainable=lora | an adapter is the default
bf16 fp16 torch_dtype | compute.dtype=bfloat16 | opd takes the data type by name
load_in_4bit | compute.quantization=nf4 | opd takes the kind of quantization by name
load_in_8bit | compute.quantization=int8 | opd takes the kind of quantization by name
gradient_checkpointing enable_gradient_checkpointing | compute.activation_checkpointing=true
# objective
beta | objective.divergence=jsd objective.jsd_beta=0.5
    | opd has no KL to a reference model; GKD's beta is objective.jsd_beta (at 0 divergence=forward_kl, at 1 reverse_kl)
lmbda | warmup.steps=20 | opd is always on-policy (lmbda = 1); warmup.steps learns from teachers' responses first
kl_coef kl_loss_coef init_kl_coef kl_penalty use_kl_loss | objective.coef=1.0
    | opd has no KL to a reference model; objective.coef weighs the KL to the teacher
entropy_coeff entropy_coef ent_coef | objective.divergence=reverse_kl
    | opd has no entropy bonus; the reverse KL contains the student's entropy
clip_ratio epsilon cliprange clip_range
    | objective.type=immediate objective.loss=ppo objective.clip_low=0.2 objective.clip_high=0.2
    | opd clips with loss = 'ppo'
clip_ratio_low epsilon_low | objective.type=immediate objective.loss=ppo objective.clip_low=0.2
    | opd clips with loss = 'ppo'
clip_ratio_high epsilon_high | objective.type=immediate objective.loss=ppo objective.clip_high=0.28
    | opd clips with loss = 'ppo'
clip_ratio_c delta | objective.type=immediate objective.loss=ppo objective.clip_dual=3.0 | opd clips with loss = 'ppo'
num_iterations ppo_epochs | objective.type=immediate objective.loss=ppo objective.epochs=2
    | several epochs need loss = 'ppo'
loss_type loss_agg_mode | objective.normalizer=token
    | opd averages by objective.normalizer: trajectory (grpo), token (dapo) or constant (dr_grpo)
gamma | objective.type=to_go objective.discount=1.0 | only types with a future part have a discount
reward_weights reward_funcs | reward.coef=1.0 sampling.group_size=4
    | a response has one reward; opd.train(config, reward=...) may combine several
adv_estimator scale_rewards | reward.coef=1.0 sampling.group_size=4 reward.baseline=grpo
    | reward.baseline makes advantages of rewards
# data
dataset dataset_name dataset_path train_files train_file | tasks.train.type=file tasks.train.path=train.jsonl
    | every task of [tasks] has its own prompts
eval_dataset val_files val_file test_files
    | tasks.train.type=file tasks.train.path=train.jsonl tasks.train.held_out_path=held_out.jsonl
    | every task of [tasks] has its own held-out prompts
# a run
output_dir default_local_dir | output=runs/my-run
run_name experiment_name | output=runs/my-run | the run folder is the run's name
save_steps save_freq | checkpoint.every=20
save_total_limit max_actor_ckpt_to_keep | checkpoint.keep=2
eval_steps test_freq | evaluation.every=50
eval_steps test_freq | evaluation.num_prompts=128 | opd sft evaluates once, after training
logging_steps log_freq | logging.samples_every=20 | opd logs every step, and shows responses at intervals
logging_steps log_freq |  | opd logs every step
report_to logger | 'logging.writers=["tensorboard"]' | opd takes a list, and always writes metrics.jsonl
# machines
use_vllm vllm_mode | backend=ray | the Ray backend samples with vLLM
tensor_parallel_size tensor_model_parallel_size vllm_tensor_parallel_size
    | backend=ray 'cluster.engine_args=["--tensor-parallel-size=2"]' cluster.gpus_per_engine=2 | vLLM gets its own arguments
gpu_memory_utilization vllm_gpu_memory_utilization | backend=ray 'cluster.engine_args=["--gpu-memory-utilization=0.8"]'
    | vLLM gets its own arguments
fsdp deepspeed n_gpus_per_node num_processes | backend=ray cluster.learner_ranks=2 | the Ray backend trains with FSDP2
"""


def _read(table: str) -> Iterator[Alias]:
    """The rows of a table: names | overrides | note. An indented line continues the row above it."""
    for row in re.sub(r"\n +", " ", table.strip()).splitlines():
        if not row.startswith("# "):
            yield Alias(*(part.strip() for part in row.split(" |")))


_TABLE = tuple(_read(_ALIASES))


def answer(key: str, value: Any, known: Collection[str]) -> str | None:
    """One line for an unknown key that another library has, or that stands in another table of opd; None for any other.

    known: every dotted key of the recipe; of a table whose keys are names, such as [teachers], the table alone.
    """
    for name, given in _leaves(key, value):
        parts = name.split(".")
        suffixes = [".".join(parts[start:]) for start in range(len(parts))]
        for alias in (a for s in suffixes for a in _TABLE if s in a.names.split() and _fits(a, known)):
            return f"unknown key '{name}': {_advice(alias, given)}"
        homes = [k for k in known if k.rpartition(".")[2] == parts[-1]]
        if len(homes) == 1:
            return f"unknown key '{name}': {_advice(Alias(name, f'{homes[0]}='), given)}"
    return None


def _fits(alias: Alias, known: Collection[str]) -> bool:
    keys = [override.partition("=")[0] for override in alias.overrides]
    return all(any(key == k or key.startswith(f"{k}.") for k in known) for key in keys)


def _advice(alias: Alias, given: Any) -> str:
    if alias.note:
        return f"{alias.note}; {f'write {alias.write}' if alias.write else 'remove this key'}"
    target = alias.write.partition("=")[0]
    text = given if isinstance(given, str) else json.dumps(given, default=str).replace("e-0", "e-")
    return f"opd calls it {target}; write {shlex.quote(f'{target}={text}')}"


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every dotted key at or below `key` with its value."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value
