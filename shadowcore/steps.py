"""A run, step by step, and a page to look inside: what `shadowcore show` does, for a machine of one's own.

tables.activate(vm.vcpus[0])
run = steps.capture(vm, steps.operations(vm, ops, notes))
steps.write("steps.html", steps.page([run], "My guest", "", "python my.py"))
"""

from .report.steps import page, write
from .studies.scenarios import SCENARIOS, Scenario
from .studies.stepped import show
from .studies.steps import Action, Step, Steps, capture, operations

__all__ = ["SCENARIOS", "Action", "Scenario", "Step", "Steps", "capture", "operations", "page", "show", "write"]
