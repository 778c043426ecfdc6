"""What groups mean for the router in the two layouts."""

import pytest
import torch

from hf_mcsmoe.recipe import LAYOUTS
from hf_mcsmoe.routing import ROUTING
from hf_mcsmoe.types import ExpertGroups

GROUPS = ExpertGroups(group_of_expert=torch.tensor([1, 0, -1, 1, 0]), dominant_of_group=torch.tensor([1, 3]))


def test_the_map_sends_each_slot_to_the_group_of_its_expert_and_dropped_ones_nowhere():
    routing = ROUTING["mapped"](GROUPS)
    assert routing.slot_map.tolist() == [1, 0, -1, 1, 0]
    assert routing.rows is None


def test_the_native_router_keeps_the_rows_of_the_dominant_experts_in_order():
    routing = ROUTING["native"](GROUPS)
    assert routing.rows.tolist() == [1, 3]
    assert routing.slot_map is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeping_all_experts_is_the_identity(layout):
    everyone = torch.arange(5)
    routing = ROUTING[layout](ExpertGroups(everyone, everyone))
    kept = routing.slot_map if layout == "mapped" else routing.rows
    assert kept.tolist() == [0, 1, 2, 3, 4]


def test_there_is_one_rule_for_each_layout():
    assert list(ROUTING) == sorted(LAYOUTS)


def test_gate_mass_through_the_map_is_that_of_the_matrix_of_methods_md_0_3():
    # ghat = g A with A (N, M) the assignment; a dropped slot adds nothing. Slots 0 and 3 share expert 1.
    assignment = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1], [1, 0]], dtype=torch.float64)
    gates = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1], dtype=torch.float64)
    slot_map = ROUTING["mapped"](GROUPS).slot_map
    mass = torch.zeros(2, dtype=torch.float64)
    for slot, expert in enumerate(slot_map.tolist()):
        if expert >= 0:
            mass[expert] += gates[slot]
    torch.testing.assert_close(mass, gates @ assignment)
