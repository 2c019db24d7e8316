"""Several models in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelManagementError
from ..model_group import check_model_id
from .common import Buildable

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..model import Model


class MultiModelBuilder(Buildable):
    """Builds one `Model` that holds several: calls name one by ``model_id=``, or mean the default.

    They share the threads that compute, so requests to different models take turns.

    Examples
    --------
    >>> builder = MultiModelBuilder().add_model(ModelBuilder("a.gguf")).add_model_with_alias("b", ModelBuilder("b.gguf"))
    """

    def __init__(self) -> None:
        self.models: dict[str, Buildable] = {}
        self.default: str | None = None

    def add_model(self, builder: Buildable) -> Self:
        """Add a model under the id that its builder names: its ``model_id``."""
        _check_builder(builder)
        return self.add_model_with_alias(builder._name(), builder)

    def add_model_with_alias(self, model_id: str, builder: Buildable) -> Self:
        """Add a model under an id of your choice.

        Raises
        ------
        ModelManagementError
            The id is taken or no string, or what is to be added is no builder.
        """
        check_model_id(model_id)
        _check_builder(builder)
        if model_id in self.models:
            raise ModelManagementError(f"there is a model {model_id!r} already; give one of them another id with add_model_with_alias")
        self.models[model_id] = builder
        return self

    def with_default_model(self, model_id: str) -> Self:
        """Choose the model that answers requests without ``model_id``; else it is the first."""
        self.default = model_id
        return self

    def _name(self) -> str:
        raise ModelManagementError("a MultiModelBuilder names several models; add each of them")

    def _load(self) -> Model:
        if not self.models:
            raise ModelManagementError("there is no model to build; call add_model first")
        if self.default is not None and self.default not in self.models:
            known = ", ".join(map(repr, self.models))
            raise ModelManagementError(f"there is no model {self.default!r} to be the default; there are {known}")
        (own_id, first), *others = self.models.items()
        model = first.load()
        try:
            model._rename(own_id)
            for model_id, builder in others:
                model._add_model(model_id, builder)
            if self.default is not None:
                model.set_default_model_id(self.default)
        except BaseException:
            model.close_now()
            raise
        return model


def _check_builder(builder: object) -> None:
    if not isinstance(builder, Buildable):
        raise ModelManagementError(f"add_model takes a builder, such as ModelBuilder(...), got {builder!r}")
