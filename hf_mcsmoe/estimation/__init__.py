"""What compressing a model will cost: operations, bytes, memory and time of both executors, before it is done."""

from .estimate import Estimate, estimate
from .machine import MachineRates, measure_machine
from .workload import Workload

__all__ = ["Estimate", "MachineRates", "Workload", "estimate", "measure_machine"]
