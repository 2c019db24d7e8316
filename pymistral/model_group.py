"""Several models behind one `Model`: which there are, which is meant, and bringing them in and out of memory."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from .errors import EngineClosedError, ModelManagementError

if TYPE_CHECKING:
    from typing_extensions import Self

ModelStatus = Literal["loaded", "unloaded", "reloading"]


class ModelSource(Protocol):
    """What `Model.add_model` takes: any builder."""

    def load(self) -> ModelGroup: ...


class Entry:
    """One of the models.

    Attributes
    ----------
    model
        The model; None for the one that the `Model` in the caller's hands is itself.
    status
        Whether it is in memory.
    lock
        Held while it is loaded or unloaded.
    """

    def __init__(self, source: ModelSource | None, model: ModelGroup | None) -> None:
        self.source, self.model = source, model
        self.status: ModelStatus = "loaded"
        self.lock = threading.Lock()


def check_model_id(model_id: object) -> None:
    """Raises ModelManagementError if no call could name a model so: None means the default one."""
    if not isinstance(model_id, str) or not model_id:
        raise ModelManagementError(f"a model's id is a non-empty string, got {model_id!r}")


class ModelGroup:
    """The part of `Model` that manages several: each method may be called from any thread or task.

    Requests name a model by ``model_id=``; without one they go to the default model: at first that which the `Model` was built as.
    """

    _model_id: str
    _close_engine: weakref.finalize[..., Any]

    def _start_group(self) -> None:
        self._entries = {self._model_id: Entry(None, None)}
        self._default_id = self._own_id = self._model_id
        self._closed = False
        self._group_lock = threading.Lock()

    def _built_by(self, source: ModelSource) -> None:
        """Remember how to load this very model again."""
        entry = self._entries[self._own_id]
        entry.source = entry.source or source

    def _rename(self, model_id: str) -> None:
        """Give this very model another id, before anyone else knows it."""
        self._entries = {model_id: self._entries[self._own_id]}
        self._default_id = self._own_id = self._model_id = model_id

    def list_models(self) -> list[str]:
        """The ids of all models, loaded or not."""
        return list(self._entries)

    def list_models_with_status(self) -> list[tuple[str, ModelStatus]]:
        """The ids of all models, and whether each is ``"loaded"``, ``"unloaded"`` or ``"reloading"``."""
        with self._group_lock:
            return [(model_id, self._status(entry)) for model_id, entry in self._entries.items()]

    def is_model_loaded(self, model_id: str) -> bool:
        """Whether a model is in memory."""
        return self._status(self._entry(model_id)) == "loaded"

    def get_default_model_id(self) -> str:
        """The id of the model that answers requests without ``model_id``."""
        return self._default_id

    def set_default_model_id(self, model_id: str) -> None:
        """Have this model answer requests without ``model_id``."""
        self._entry(model_id)
        self._default_id = model_id

    async def add_model(self, model_id: str, builder: ModelSource) -> None:
        """Load another model under an id of its own. It shares the threads that compute with the others.

        Raises
        ------
        ModelManagementError
            The id is taken.
        ModelLoadError
            The model cannot be found, fetched, parsed or built.
        """
        await asyncio.to_thread(self._add_model, model_id, builder)

    async def remove_model(self, model_id: str) -> None:
        """Unload a model and forget it. The default model cannot be removed: choose another one first."""
        await asyncio.to_thread(self._remove_model, model_id)

    async def unload_model(self, model_id: str) -> None:
        """Free the memory of a model, its weights and its cache; `reload_model` brings it back. Unloading again does nothing.

        Its running requests end with `EngineClosedError`; those that come later are refused with `ModelManagementError`.
        """
        await asyncio.to_thread(self._unload_model, model_id)

    async def reload_model(self, model_id: str) -> None:
        """Bring an unloaded model back. If it is loaded, or is being loaded already, this waits and does nothing else."""
        await asyncio.to_thread(self._reload_model, model_id)

    def _member(self, model_id: str | None) -> Self:
        """The model that is meant.

        Raises
        ------
        ModelManagementError
            There is none with this id, or it is not in memory.
        """
        name = self._default_id if model_id is None else model_id
        with self._group_lock:
            entry = self._entry(name)
            if entry.status == "loaded":
                return self if entry.model is None else cast("Self", entry.model)
        raise self._not_loaded(name)

    def _status(self, entry: Entry) -> ModelStatus:
        return "unloaded" if self._closed else entry.status

    def _entry(self, model_id: str) -> Entry:
        check_model_id(model_id)
        try:
            return self._entries[model_id]
        except KeyError:
            known = ", ".join(map(repr, self._entries))
            raise ModelManagementError(f"there is no model {model_id!r}; there are {known}") from None

    def _not_loaded(self, model_id: str) -> ModelManagementError:
        loaded = ", ".join(repr(name) for name, entry in self._entries.items() if entry.status == "loaded") or "none"
        return ModelManagementError(f"the model {model_id!r} is not loaded; call reload_model({model_id!r}) first (loaded: {loaded})")

    def _add_model(self, model_id: str, builder: ModelSource) -> None:
        check_model_id(model_id)
        if not hasattr(builder, "load"):
            raise ModelManagementError(f"add_model takes a builder, such as ModelBuilder(...), got {builder!r}")
        entry = Entry(builder, None)
        entry.status = "reloading"
        with entry.lock:
            with self._group_lock:
                if model_id in self._entries:
                    raise ModelManagementError(f"there is a model {model_id!r} already; remove_model({model_id!r}), or choose another id")
                self._check_open()
                self._entries[model_id] = entry
            try:
                self._load(model_id, entry, builder)
            except BaseException:
                with self._group_lock:
                    del self._entries[model_id]
                raise

    def _remove_model(self, model_id: str) -> None:
        if model_id == self._default_id:
            raise ModelManagementError(f"{model_id!r} is the default model; choose another one with set_default_model_id first")
        self._unload(model_id, self._entry(model_id), "removed")

    def _unload_model(self, model_id: str) -> None:
        entry = self._entry(model_id)
        if entry.source is None:
            raise ModelManagementError(f"the model {model_id!r} was not made by a builder, so it could not be reloaded; close it instead")
        self._unload(model_id, entry)

    def _unload(self, model_id: str, entry: Entry, how: str = "unloaded") -> None:
        with entry.lock:
            with self._group_lock:
                loaded, entry.status = entry.status == "loaded", "unloaded"
                model, entry.model = entry.model, None
                if how == "removed":
                    self._entries.pop(model_id, None)
            if loaded:
                (model or self)._drop()

    def _reload_model(self, model_id: str) -> None:
        entry = self._entry(model_id)
        with entry.lock:
            self._check_open()
            if entry.status == "loaded":
                return
            if entry.source is None or self._entries.get(model_id) is not entry:
                raise ModelManagementError(f"the model {model_id!r} has been removed")
            entry.status = "reloading"
            try:
                self._load(model_id, entry, entry.source)
            except BaseException:
                entry.status = "unloaded"
                raise

    def _load(self, model_id: str, entry: Entry, source: ModelSource) -> None:
        model = source.load()
        model._rename(model_id)
        with self._group_lock:
            if not self._closed:
                if model_id == self._own_id:
                    self._adopt(model)
                else:
                    entry.model = model
                entry.status = "loaded"
                return
        model._close_all()
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the model has been closed; build it again to use it")

    def _drop(self) -> None:
        """Let go of the engine and all that belongs to it. Whoever asks for it from now on meets `__getattr__`."""
        self._close_engine()
        if (own := self._entries.get(self._own_id)) is not None:
            own.status = "unloaded"
        for name in vars(self).keys() - _KEPT:
            delattr(self, name)

    def _adopt(self, model: ModelGroup) -> None:
        """Take over the engine of a model that was just built, and the duty to close it."""
        finalizer = model._close_engine.detach()
        assert finalizer is not None
        _, close, arguments, _ = finalizer
        for name, value in vars(model).items():
            if name not in _KEPT:
                setattr(self, name, value)
        self._close_engine = weakref.finalize(self, close, *arguments)

    def __getattr__(self, name: str) -> Any:
        entries = vars(self).get("_entries")
        if entries is None or name.startswith("__") or not name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        own = entries.get(self._own_id)
        if own is not None and own.status == "loaded":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise self._not_loaded(self._own_id)

    def _close_all(self) -> None:
        with self._group_lock:
            self._closed = True
            models = [entry.model for entry in self._entries.values() if entry.model is not None]
        if (close := vars(self).get("_close_engine")) is not None:
            close()
        for model in models:
            model._close_all()


_KEPT = {"_closed", "_default_id", "_entries", "_group_lock", "_model_id", "_own_id"}
