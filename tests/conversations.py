"""Normalised messages and chat templates for tests."""

from itertools import cycle

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def message(role, *parts):
    """A normalised message; strings become text parts."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": role, "content": content}


def say(*texts, system=None):
    """Text messages, user and assistant in turn, the user first."""
    messages = [] if system is None else [message("system", system)]
    roles = cycle(("user", "assistant"))
    return messages + [message(role, text) for role, text in zip(roles, texts, strict=False)]


# Chat templates in the manner of the hub's: media first, then text.
PARTS = """
{%- macro text(m) -%}
{%- for p in m['content'] if p['type'] != 'text' -%}{{ '<' + p['type'] + '>\n' }}{%- endfor -%}
{%- for p in m['content'] if p['type'] == 'text' -%}{{ p['text'] }}{%- endfor -%}
{%- endmacro -%}
"""
HEADERS = (
    PARTS
    + """
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + text(m) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
)
"""LLaMA 3's; the template writes the BOS."""
NO_END = (
    PARTS
    + """
{%- for m in messages -%}{{- m['role'].upper() + ': ' + text(m) + ' ' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)
"""As llava-hf's first: no end mark after an answer."""
CHATML = """
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' + (m['content'] | trim) + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""Content is a string, and trimmed; a line break follows the end mark."""
FORGETFUL = """
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- 'Q: ' + m['content'] + '\n' -}}
{%- elif loop.last -%}{{- 'A: ' + m['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'A:' -}}{%- endif -%}
"""
"""Leaves earlier answers out."""
