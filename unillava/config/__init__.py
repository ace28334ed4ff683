"""config.json of a LLaVA checkpoint to LlavaSpec, strictly, and back.

Read are the files of model types llava, llava_next and llava_next_video as transformers 4.36 to
5.x write them: sparse (only what differs from the class defaults, so the defaults are tables
here) or complete, `rope_theta` and `rope_scaling` or `rope_parameters`, `torch_dtype` or
`dtype`, `image_token_index` or `image_token_id`. What these files cannot say stands in one more
object, `"unillava"`; `tables.OWN_FIELDS` lists its fields.

Nothing that would change the computation is passed over: an unknown architecture, activation or
rotary type, a contradiction, a value of the wrong type, a feature that is not supported each
raise ConfigError with the dotted name of the field. Fields that transformers itself ignores at
inference (dropout, initialiser, token ids of generation, …) are ignored here too.
"""

from unillava.config.read import read_spec
from unillava.config.write import write_config

__all__ = ["read_spec", "write_config"]
