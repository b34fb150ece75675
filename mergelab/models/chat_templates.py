"""Chat templates: what ``save.chat_template`` stands for. A format by name is written as mergekit's of that name.

Its line breaks and spaces are mergekit's too, where a model's maker has others (llama3, alpaca, exaone).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergelab.errors import ConfigError, did_you_mean, listed, one_line, shortened
from mergelab.models.tokens import chat_template

AUTO = "auto"
_GENERATION = re.compile(r"\b(end)?generation(?=\s*[-+]?%\})")
# Jinja as transformers reads it: blocks alone on a line leave no line.
FORMATS: Mapping[str, str] = {
    "chatml": """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama3": """\
{%- for message in messages %}
{{- bos_token if loop.first else '' }}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """\
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}
{{- bos_token }}
{%- for message in turns %}
{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{- raise_exception('after a system message, turns of user and assistant must alternate, the first a user\\'s') }}
{%- elif message.role == 'user' %}
{{- ' [INST] ' ~ (system if loop.first else '') ~ message.content ~ ' [/INST]' }}
{%- else %}
{{- ' ' ~ message.content ~ eos_token }}
{%- endif %}
{%- endfor %}
""",
    "alpaca": """\
{%- set titles = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} %}
{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | map('trim') | list | last or '' }}
{{- '\\n\\n' }}
{%- for message in messages if message.role in titles %}
{{- '### ' ~ titles[message.role] ~ ':\\n' ~ message.content | trim ~ ('' if loop.last else '\\n\\n') }}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}
{{- '### Response:\\n' }}
{%- endif %}
""",
    "exaone": """\
{%- for message in messages %}
{{- '        [|system|][|endofturn|]\\n\\n' if loop.first and message.role != 'system' else '' }}
{{- '    [|' ~ message.role ~ '|]' ~ message.content }}
{{- '\\n        ' ~ ('' if message.role == 'user' else '[|endofturn|]') ~ '\\n\\n' }}
{%- endfor %}
{{- '    [|assistant|]\\n' if add_generation_prompt else '' }}
""",
}


def check_template(given: str | None, where: str) -> None:
    """Check what a setting says of a chat template.

    Raises:
        ConfigError: it is neither ``auto``, nor a format's name, nor a text of Jinja.
    """
    if given is None or given == AUTO or given in FORMATS:
        return
    if "{" not in given:
        known = [AUTO, *FORMATS]
        raise ConfigError(
            f"{where}={shortened(given)}: must be {listed(known)}, or a template's text{did_you_mean(given, known)}"
        )
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        extensions = ["jinja2.ext.loopcontrols", "jinja2.ext.do"]
        plain = _GENERATION.sub(lambda tag: "endif" if tag[1] else "if true", given)  # a tag of transformers' own
        ImmutableSandboxedEnvironment(extensions=extensions).parse(plain)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{where}: is no template, line {error.lineno}: {one_line(str(error.message))}") from None


def chosen_template(given: str | None, folders: Sequence[Path]) -> str | None:
    """Return the text of the template that a setting stands for; None: the tokenizer's own stays.

    Args:
        given: as `check_template` has it.
        folders: of all models. ``auto`` is the template that most of them have, the earlier one of two that are in as
            many.
    """
    if given is None or given in FORMATS:
        return None if given is None else FORMATS[given]
    if given != AUTO:
        return given
    found = Counter(text.strip() for folder in folders if (text := chat_template(folder)))
    return found.most_common(1)[0][0] if found else None
