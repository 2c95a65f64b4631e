"""What holds behind blocks holds at linear layers: the same tests, with the same bundles at other places.

One bundle is of kind "mlp" and one of kind "lora", at all linear layers; one is behind the blocks and at the linears.
"""

from __future__ import annotations

import models
import pytest
import test_compiled_swaps
from test_architectures import *  # noqa: F403
from test_beside_others import *  # noqa: F403
from test_call_alphas import *  # noqa: F403
from test_checkpoints import *  # noqa: F403
from test_compiled_swaps import *  # noqa: F403
from test_dialling import *  # noqa: F403
from test_inference import *  # noqa: F403
from test_peft import *  # noqa: F403
from test_recompute import *  # noqa: F403
from test_running import *  # noqa: F403


pytestmark = pytest.mark.slow

# These look at blocks, or compile for long; test_places.py and test_linears.py have their likes. With LoRA on the same
# layers what is added first depends on the order, and with it the last bit.
BEHIND_BLOCKS = """
    test_block_with_its_hook_adds_no_graph_break test_an_exported_program_computes_the_same
    test_continuous_batching_sees_set_alphas_only test_order_of_imports
    test_models_that_are_no_causal_language_models_are_refused
    test_blocks_are_found test_two_lists_of_blocks_are_not_chosen_from
    test_bundles_sit_on_the_language_model_and_not_on_a_tower
    test_values_and_gradients_are_those_of_the_written_equations test_hook_compiles_without_graph_break
    test_gradient_reaches_every_bundle_of_every_layer test_dtype_of_adapter_on_a_bfloat16_base
    test_unsaved_basis_is_drawn_again test_the_basis_comes_back_from_float64_to_float32
    test_layers_keep_their_numbers_when_they_are_named test_whoever_looks_at_all_tensors_sees_the_basis
    test_a_config_from_a_file_without_its_tensors_has_the_basis_of_its_seed
    test_a_refused_file_leaves_the_basis_to_be_drawn test_lora_and_bundles_do_not_depend_on_the_order
    test_lora_peft_model_over_injected_bundles test_transformers_holds_bundles_and_lora
    test_injection_where_a_state_dict_says test_several_active_adapters_add_up test_adapters_on_different_layers
    test_status test_only_adapter_weights_train_and_are_counted test_layers_to_transform test_module_filters
"""
COMPILED = {name for name in dir(test_compiled_swaps) if name.startswith("test_")} - {"test_compiled_generation"}
for each in {*BEHIND_BLOCKS.split(), *COMPILED}:
    del globals()[each]


@pytest.fixture(autouse=True)
def _at_linears(monkeypatch):
    monkeypatch.setattr(models, "at_linears", True)
