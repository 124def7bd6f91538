"""The `build` of a plugin, whose mistakes are told and whose modules become probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType

from torch import nn
from torch.nn.parameter import is_lazy

from patchbank.pipeline.errors import PatchbankError, TrialError, told
from patchbank.probing.probes.base import Options, Probe, ProbeShape
from patchbank.probing.probes.module import ModuleProbe
from patchbank.probing.randomness import seeded

UserBuild = Callable[[ProbeShape, Options], Probe | nn.Module]


@dataclass(frozen=True)
class PluginBuild:
    """Builds a probe with a plugin's function, and touches no global generator of torch."""

    name: str
    where: str
    """The file or package, for messages."""
    function: UserBuild

    def __call__(self, shape: ProbeShape, options: Options) -> Probe:
        with seeded(0):
            built = self._checked(shape, options)
        if isinstance(built, Probe):
            return built
        return ModuleProbe(shape, self.name, self._module, dict(options))

    def _module(self, shape: ProbeShape, options: Options) -> nn.Module:
        built = self._checked(shape, options)
        assert isinstance(built, nn.Module)
        return built

    def _checked(self, shape: ProbeShape, options: Options) -> Probe | nn.Module:
        file = self.function.__code__.co_filename if isinstance(self.function, FunctionType) else ""
        try:
            built: object = self.function(shape, options)
        except PatchbankError:
            raise
        except Exception as error:
            raise TrialError(f"build() of {self.where} failed: {told(error, file)}") from error
        if isinstance(built, nn.Module):
            self._check_parameters(built)
        elif not isinstance(built, Probe):
            raise TrialError(
                f"build() of {self.where} returned {type(built).__name__}, expected a "
                "torch.nn.Module or a Probe (docs/probes.md)"
            )
        return built

    def _check_parameters(self, module: nn.Module) -> None:
        if any(is_lazy(one) for one in module.parameters()):
            raise TrialError(
                f"build() of {self.where} returned lazy layers, expected ones whose sizes are "
                "known; take them from shape.dim and shape.n_classes"
            )
        if not any(one.requires_grad for one in module.parameters()):
            raise TrialError(
                f"build() of {self.where} returned a module without parameters to train, "
                "expected some"
            )


def build_of(found: object, name: str, where: str) -> PluginBuild:
    """What a module calls `build`, or the function that an entry point names itself."""
    function = found.__dict__.get("build") if isinstance(found, ModuleType) else found
    if not callable(function):
        raise TrialError(f"{where} has no build(shape, options), expected that function")
    return PluginBuild(name, where, function)
