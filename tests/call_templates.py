"""Chat templates that write tool calls in the ways that are in use, in frames that the test tokenizers have tokens for."""

from opd.records import Prompt

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate arithmetic.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
NOTE = {"type": "function", "function": {"name": "note", "description": "Keep.", "parameters": {"type": "object"}}}


def asked(text: str = "What is 1 + 2?", *, tools=(CALCULATOR, NOTE)) -> Prompt:
    return Prompt("p", ({"role": "user", "content": text},), teacher="t", task="task", tools=tuple(tools))


def chatml(answer: str, *, tool: str = "m.content") -> str:
    """The frame of ChatML around how an assistant's message `m` and a tool's are written."""
    return (
        "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}" + answer + "{% elif m.role == 'tool' %}{{ " + tool + " }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# Text, then a call a line between tags (Qwen2.5, Hermes).
TAGGED = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first else '' }}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) }}'
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
# One call and nothing else (Llama 3.1).
SINGLE = (
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}"
)
# All calls in one list, each with its id, behind the text (Mistral).
LISTED = (
    "{{ m.content }}{% if m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids of nine letters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' + (', ' if not loop.last else ']') }}"
    "{% endfor %}{% endif %}"
)
# Arguments as the text of an object (DeepSeek); an object raises a TypeError.
FENCED = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ 'call ' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}"
)
# Arguments one by one, no JSON (Qwen3-Coder).
BY_KEY = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>' + (v | string) + '</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}"
)
# The arguments before the name.
TURNED = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>{\"arguments\": ' + (c.function.arguments | tojson) + ', \"name\": \"' + c.function.name + '\"}</tool_call>' }}"
    "{% endfor %}"
)
# Nothing but ASCII.
ESCAPED = TAGGED.replace("| tojson", "| tojson(ensure_ascii=true)")
# A thought before every answer, an empty one where there was none (Qwen3).
THINKING = (
    "{% set said = m.content.split('</think>')[-1].lstrip() %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}" + TAGGED.replace("m.content", "said")
)

LLAMA = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    '{{ \'Respond in the format {"name": function name, "parameters": dictionary of arguments}.\n\n\' }}'
    "{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}" + SINGLE + "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids of nine letters') }}{% endif %}"
    '{{ \'[TOOL_RESULTS]{"content": "\' + m.content + \'", "call_id": "\' + m.tool_call_id + \'"}[/TOOL_RESULTS]\' }}'
    "{% else %}" + LISTED + "{{ eos_token }}{% endif %}{% endfor %}"
)
