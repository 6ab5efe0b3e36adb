# SPDX-License-Identifier: Apache-2.0
"""Small chat templates in five styles of the field, and a tokenizer folder for each.

``<<`` and ``>>`` stand around what the assistant writes: nothing, or ``{% generation %}``.
"""

from __future__ import annotations

import json

STYLES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}<<{{ m.content + '<|im_end|>' }}>>"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>tools<|end_header_id|>\\n\\n' }}"
        "{{ tools | tojson }}{{ '<|eot_id|>' }}{% endif %}"
        "{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{% if m.role == 'assistant' %}<<{{ m.content | trim }}{{ '<|eot_id|>' }}>>"
        "{% else %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}<<{{ ' ' + m.content + eos_token }}>>"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\\n' }}"
        "{% if m.role == 'assistant' %}<<{{ m.content | trim }}{{ '<end_of_turn>' }}>>"
        "{% else %}{{ m.content | trim }}{{ '<end_of_turn>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
        "{% if m.role == 'assistant' %}<<{{ m.content + eos_token }}>>"
        "{% else %}{{ m.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
}
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
TEXT = "the cat sat on the mat and the other cat asked: what is two and two? four, said the first."


def template(style, *, tagged=False):
    """Return the Jinja source of *style*."""
    marks = ("{% generation %}", "{% endgeneration %}") if tagged else ("", "")
    return STYLES[style].replace("<<", marks[0]).replace(">>", marks[1])


def save_tokenizer(folder, style="chatml", *, tagged=False):
    """Write a byte-level BPE tokenizer with the template of *style* into *folder*; return it."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"} if style == "zephyr" else "</s>",
        "chat_template": template(style, tagged=tagged),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
