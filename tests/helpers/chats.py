"""Chat templates in the styles of published ones, written anew; each marks what the assistant says."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LOOP = "{% for m in messages %}"
SAYS = "{% generation %}{{ m.content }}"
TEMPLATES = {
    "chatml": LOOP
    + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    + SAYS
    + "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml with a system prompt of its own": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    + "{% endif %}"
    + LOOP
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    + SAYS
    + "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama 2": "{% if messages[0].role == 'system' %}{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    + "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (lead if loop.first else '') + m.content }}"
    + " [/INST]{% elif m.role == 'assistant' %}{% generation %} {{ m.content | trim }} {{ eos_token }}{% endgeneration %}"
    + "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    "llama 3": "{{ bos_token }}"
    + LOOP
    + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}"
    + "{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}{% else %}{{ m.content | trim }}<|eot_id|>"
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% set ns = namespace(system='') %}"
    + LOOP
    + "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
    + "[INST] {{ ns.system if loop.index0 < 2 else '' }}{{ m.content }} [/INST]{% else %}{% generation %} {{ m.content }}"
    + "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "zephyr": LOOP
    + "{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    + "{% else %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{% endif %}{{ '\n' }}"
    + "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "phi 3": LOOP
    + "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    + SAYS
    + "<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "gemma": "{{ bos_token }}"
    + LOOP
    + "{% set role = 'model' if m.role == 'assistant' else 'user' %}{{ '<start_of_turn>' + role + '\n' }}"
    + "{% if role == 'model' %}{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}"
    + "{% else %}{{ m.content | trim }}<end_of_turn>{% endif %}{{ '\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "vicuna": LOOP
    + "{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    + "{% else %}{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}"
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "tulu": LOOP
    + "{%- if m.role == 'assistant' -%}\n{{ '<|assistant|>\n' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    + "{% if not loop.last %}{{ '\n' }}{% endif %}{%- else -%}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{%- endif -%}"
    + "{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "command r": "{{ bos_token }}"
    + LOOP
    + "{% if m.role == 'assistant' %}<|CHATBOT|>{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    + "{% else %}{{ '<|' + m.role | upper + '|>' + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|CHATBOT|>{% endif %}",
    "with tojson, break and a date": "{{ strftime_now('%Y')[:0] }}"
    + LOOP
    + "{% if loop.index > 99 %}{% break %}{% endif %}{{ {'role': m.role} | tojson }}{% if m.role == 'assistant' %}"
    + SAYS
    + "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    + "{% if add_generation_prompt %}{{ {'role': 'assistant'} | tojson }}{% endif %}",
}
SPECIAL = """
    <s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end|> <start_of_turn> <end_of_turn>
""".split()
TEXT = (
    "You help. What is the plural of fox? foxes It is said that foxes sleep; user assistant system [INST] [/INST] USER:"
)


def without_marks(template: str) -> str:
    """The template as it is mostly published: nothing says where the assistant speaks."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def save_tokenizer(folder: Path, template: str | None = None, **settings: object) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with the special tokens of many models, and a template beside it."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL)
    trained.train_from_iterator([TEXT] * 5, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", **settings)
    made.chat_template = template
    made.save_pretrained(folder)
    return made
