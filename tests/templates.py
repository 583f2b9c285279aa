# ruff: noqa: E501
"""Chat templates in the shape of the families that know tools, a strict one that knows none, and templates of the same behaviour as
those of the makers whose texts are not ours to give away. Written for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HERMES = """{%- if tools %}{{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools>\\n<tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3 = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools %}
    {%- set first = messages[0].content %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nRespond in the format {"name": function name, "parameters": {...}}.\\n\\n' }}
    {%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}{{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in messages if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
    {%- if (message.role == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST] ' }}{%- if system and loop.last %}{{- system + '\\n\\n' }}{%- endif %}{{- message.content + '[/INST]' }}
    {%- elif message.tool_calls %}{{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + ', "id": "' + call.id + '"}' }}
            {{- ', ' if not loop.last else ']' }}
        {%- endfor %}{{- eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}"""

#: The form of later versions, with the calls' ids and without.
MISTRAL_IDS = (
    MISTRAL.replace("{{- '[TOOL_CALLS] [' }}", "")
    .replace(
        """'{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + ', "id": "' + call.id + '"}'""",
        "'[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + (call.function.arguments | tojson)",
    )
    .replace("{{- ', ' if not loop.last else ']' }}", "")
)
MISTRAL_ARGS = MISTRAL_IDS.replace(" + '[CALL_ID]' + call.id", "")

STRICT = """{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

#: Control tokens of each, beside the tiny tokenizer's own.
CONTROL = {
    HERMES: ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
    LLAMA3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    MISTRAL: ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    STRICT: [],
}
CONTROL |= {MISTRAL_IDS: [*CONTROL[MISTRAL], "[ARGS]", "[CALL_ID]"], MISTRAL_ARGS: [*CONTROL[MISTRAL], "[ARGS]"]}

# -- templates that behave as those of the makers ------------------------------------------------------------------

_ALTERNATE = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate') }}{%- endif %}"
)

#: Texts are stripped, the system's is put into the first that the user says, and every question opens with ``<s>``.
LLAMA2 = (
    """{%- set system = '' %}
{%- if messages[0].role == 'system' %}{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{%- set messages = messages[1:] %}{%- endif %}
{%- for message in messages %}"""
    + _ALTERNATE
    + """
    {%- if message.role == 'user' %}{{- bos_token + '[INST] ' + ((system if loop.first else '') + message.content).strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""
)

#: Zephyr's and TinyLlama's: its tags are ordinary text of Llama's vocabulary.
ZEPHYR = """{%- for message in messages %}{%- if message.role in ['system', 'user', 'assistant'] %}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

#: Mistral's first: the control texts are ordinary text too, and there is no system role.
MISTRAL_V01 = (
    """{{- bos_token }}{%- for message in messages %}"""
    + _ALTERNATE
    + """
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}{{- message.content + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}
{%- endfor %}"""
)

MISTRAL_V03 = "{{- bos_token }}" + MISTRAL.replace("' ' + message.content + eos", "' ' + (message.content | trim) + eos")

LLAMA31 = "{{- bos_token }}" + LLAMA3.replace("messages[0].content %}", "messages[0].content | trim %}").replace(
    "message.content + '<|eot", "(message.content | trim) + '<|eot"
).replace("Today Date: ", "Cutting Knowledge Date: December 2023\\nToday Date: ")

_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN25 = HERMES.replace("'\\n\\n' }}{%- endif %}", "'\\n\\n' }}{%- else %}{{- '" + _QWEN + "\\n\\n' }}{%- endif %}", 1).replace(
    "<|im_end|>\\n' }}{%- endif %}\n{%- for message",
    "<|im_end|>\\n' }}\n{%- else %}{{- '<|im_start|>system\\n" + _QWEN + "<|im_end|>\\n' }}{%- endif %}\n{%- for message",
    1,
)

#: Reasoning is shown from the last question on, that of earlier turns is dropped.
QWEN3 = """{%- set ns = namespace(last=messages | length - 1, asked=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.asked and message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.asked = true %}{%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
""" + HERMES.replace(
    "{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}",
    """{%- set content = message.content %}{%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}""",
).replace(
    "{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    "{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
).replace("{{- '\\n<tool_call>", "{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}{{- '<tool_call>")

GEMMA2 = (
    """{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}"""
    + _ALTERNATE
    + """
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + (message.content | trim) + '<end_of_turn>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
)

#: The system's text in front of what the user says first.
GEMMA3 = GEMMA2.replace(
    "{{- raise_exception('System role not supported') }}",
    "{%- set system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}",
).replace("'\\n' + (message.content", "'\\n' + (system if loop.first else '') + (message.content")

PHI3 = """{{- bos_token }}{%- for message in messages %}{%- if message.role in ['system', 'user', 'assistant'] %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

PHI4 = """{%- for message in messages %}{%- if message.role in ['system', 'user', 'assistant'] %}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""

#: Reads a switch in the system's text, prints today's date, and describes tools that come under other names.
SMOLLM3 = """{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
    {%- if '/no_think' in system %}{%- set mode = '/no_think' %}{%- elif '/think' in system %}{%- set mode = '/think' %}{%- endif %}
    {%- set system = system.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## Metadata\\n\\nKnowledge Cutoff Date: June 2025\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' + mode + '\\n\\n## Custom Instructions\\n\\n' }}
{{- (system or 'You are a helpful AI assistant named SmolLM, trained by Hugging Face.') + '\\n\\n' }}
{%- if xml_tools %}{{- 'Call them in <tool_call></tool_call> tags.' }}{%- endif %}{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}{% generation %}
        {{- '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n') + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endgeneration %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n') }}{%- endif %}"""

#: What stands before ``</think>`` is dropped, and the answer begins in it.
R1 = """{%- set ns = namespace(system='') %}
{%- for message in messages %}{%- if message.role == 'system' %}{%- set ns.system = message.content %}{%- endif %}{%- endfor %}
{{- bos_token }}{{- ns.system }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

GRANITE = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + '.\\nYou are Granite, developed by IBM. You are a helpful AI assistant.' %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- for message in messages %}{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""

#: gpt-oss': the maker's text has the system turn to itself, what others call system is the developer's.
HARMONY = """{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\nKnowledge cutoff: 2024-06\\nCurrent date: ' + strftime_now('%Y-%m-%d') }}
{{- '\\n\\nReasoning: ' + (reasoning_effort | default('medium')) + '\\n\\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' }}
{%- if messages[0].role in ['developer', 'system'] %}
    {{- '<|start|>developer<|message|># Instructions\\n\\n' + messages[0].content + '\\n\\n<|end|>' }}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {%- if '<|channel|>analysis<|message|>' in message.content %}{{- raise_exception('You have passed a message containing <|channel|> tags') }}{%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""


SMOLVLM = """<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}
{%- for part in message['content'] %}{%- if part['type'] == 'text' %}{{ part['text'] }}{%- elif part['type'] == 'image' %}{{ '<image>' }}{%- endif %}{%- endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

LLAVA = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}
{{- '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


#: In which users alone say parts.
MIXED = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'user' %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% else %}{{ message['content'] }}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """What a template is known to do.

    Attributes:
        template: its text; None for the one that comes with the tokenizer.
        special: control tokens it writes, beside ``<s>`` and ``</s>``.
        tags: what it writes that is in the vocabulary without being special.
        system: ``own`` turn; merged into the ``first`` question by the template; put into the ``last`` one by it; ``refused``.
        alternates: whether it refuses two turns of one role, and a greeting.
        tools: the form in which it shows tools and calls.
        parts: roles whose texts it takes as parts of their messages alone.
        kwargs: variables handed to it.
    """

    template: str | None
    special: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    system: str = "own"
    alternates: bool = False
    tools: str | None = None
    parts: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


_ALL = ("system", "user", "assistant", "tool")
_CHATML = ("<|im_start|>", "<|im_end|>")
_CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_R1 = ("<｜User｜>", "<｜Assistant｜>")

FAMILIES = {
    "llama2": Family(LLAMA2, system="first", alternates=True),
    "zephyr": Family(ZEPHYR),
    "mistral-v0.1": Family(MISTRAL_V01, system="refused", alternates=True),
    "mistral-v0.3": Family(MISTRAL_V03, tuple(CONTROL[MISTRAL]), system="last", alternates=True, tools="mistral"),
    "llama3.1": Family(LLAMA31, _LLAMA3, tools="llama3"),
    "qwen2.5": Family(QWEN25, _CHATML, _CALLS, tools="hermes"),
    "qwen3": Family(QWEN3, _CHATML, (*_CALLS, *_THINK), tools="hermes"),
    "qwen3-silent": Family(QWEN3, _CHATML, (*_CALLS, *_THINK), tools="hermes", kwargs={"enable_thinking": False}),
    "gemma2": Family(GEMMA2, _GEMMA, system="refused", alternates=True),
    "gemma3": Family(GEMMA3, _GEMMA, system="first", alternates=True),
    "phi3": Family(PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": Family(PHI4, (*_CHATML, "<|im_sep|>")),
    "smollm3": Family(SMOLLM3, _CHATML, (*_CALLS, *_THINK)),
    "r1": Family(R1, ("<｜end▁of▁sentence｜>",), (*_R1, *_THINK)),
    "granite": Family(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "smolvlm": Family(SMOLVLM, ("<|im_start|>", "<end_of_utterance>"), parts=_ALL),
    "llava": Family(LLAVA, _CHATML, parts=_ALL),
    "mixed": Family(MIXED, _CHATML, parts=("user",)),
    "harmony": Family(HARMONY, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")),
}
