"""How data are read: containers, arrays, tensors, generators of random numbers, and instances of classes."""

import array
import collections
import copyreg
import marshal
import types
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polylib.lab import code_reading, origin

if TYPE_CHECKING:
    from polylib.lab.reading import Reader

SIMPLE = {bool, int, float, complex, str, bytes, type(None)}
NAMED = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme, torch.device, torch.finfo, torch.iinfo)
CHANGEABLE = (list, dict, set, bytearray, collections.deque)
CODE = (types.FunctionType, types.ModuleType, type)
PLAIN_BASES = (object, dict, list, tuple, set, frozenset, str, bytes, bytearray, int, float, complex, BaseException)
PLAIN_BASES += (Exception, ArithmeticError, ValueError, collections.OrderedDict, collections.defaultdict)
PLAIN_BASES += (np.ndarray, torch._C.TensorBase, torch.Tensor, collections.deque)


def data(reader: "Reader", value: Any) -> str | None:
    """The digest of data of a known kind; None for other objects."""
    kind = type(value)
    if isinstance(value, NAMED):
        return reader.join(kind.__name__, repr(value))
    if isinstance(value, torch.Tensor):
        return _with_attributes(reader, value, _tensor(reader, value), (torch.Tensor, torch.nn.Parameter))
    if isinstance(value, torch.Generator):
        return reader.all("generator", (str(value.device), value.get_state()))
    if isinstance(value, np.ndarray):
        return _with_attributes(reader, value, _array(reader, value), (np.ndarray,))
    if isinstance(value, np.generic):
        return reader.join("number", str(value.dtype), value.tobytes().hex())
    if isinstance(value, np.ufunc):
        return _ufunc(reader, value)
    if isinstance(value, np.random.Generator | np.random.RandomState):
        state = value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state(legacy=False)
        return reader.all("generator", (kind, state))
    if isinstance(value, np.vectorize):
        excluded = sorted(map(repr, value.excluded))
        return reader.all("vectorize", (kind, value.pyfunc, value.otypes, value.signature, excluded, value.cache))
    if isinstance(value, weakref.ReferenceType):
        return reader.all("weak", (kind, value()))
    items = _items(reader, value)
    plain = (dict, list, tuple, set, frozenset, types.MappingProxyType, bytearray, collections.OrderedDict)
    return None if items is None else _with_attributes(reader, value, items, plain)


def _items(reader: "Reader", value: Any) -> str | None:
    """What is in a container, or in an object that is a number or a text by its class."""
    if isinstance(value, dict | types.MappingProxyType):
        made = reader.digest(value.default_factory) if isinstance(value, collections.defaultdict) else ""
        keys = list(dict.keys(value) if isinstance(value, dict) else value)
        values = [dict.__getitem__(value, key) if isinstance(value, dict) else value[key] for key in keys]
        return reader.join("dict", made, reader.digest(keys), reader.digest(values))
    if isinstance(value, list | tuple):
        content = list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value)
        items = list(content)
        name = "list" if isinstance(value, list) else "tuple"
        if all(type(item) in SIMPLE for item in items):
            return reader.bytes(name, marshal.dumps(items, 2))  # version 2 is the last without references
        return reader.all(name, items)
    if isinstance(value, collections.deque):
        return reader.join("deque", str(value.maxlen), *[reader.digest(item) for item in value])
    if isinstance(value, set | frozenset):
        reader.unordered += 1
        found = sorted(reader.digest(item) for item in value)
        reader.unordered -= 1
        return reader.join("set", *found)
    if isinstance(value, bytearray | memoryview | array.array):
        return reader.bytes(type(value).__name__, bytes(value))
    for base in (int, float, complex, str, bytes):
        if isinstance(value, base):
            plain = base.__new__(base, value) if base in (str, bytes) else base(value)
            return reader.join("as", base.__name__, reader.digest(plain))
    return None


def _with_attributes(reader: "Reader", value: Any, items: str, plain: tuple[type, ...]) -> str:
    """The digest of an object by its items, its class and its attributes."""
    if type(value) in plain and not getattr(value, "__dict__", None):
        return reader.join(type(value).__name__, items)
    return reader.join("kind", reader.digest(type(value)), items, _attributes(reader, value))


def _attributes(reader: "Reader", value: Any) -> str:
    own = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            hidden = f"_{base.__name__.lstrip('_')}{name}" if name[:2] == "__" != name[-2:] else name
            member = vars(base).get(hidden)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    own[f"{base.__name__}.{name}"] = member.__get__(value)
                except AttributeError:  # an empty slot
                    continue
    if isinstance(value, torch.nn.Module):
        own |= hooks(own)
    return reader.named("attributes", sorted((str(name), item) for name, item in own.items()))


def hooks(own: dict[str, Any]) -> dict[str, Any]:
    """The hooks of a network by their order: torch numbers them from the start of the process."""
    all_hooks = {name: item for name, item in own.items() if "_hooks" in name and isinstance(item, dict)}
    numbers = sorted({number for item in all_hooks.values() for number in item})
    return {name: [(numbers.index(n), hook) for n, hook in item.items()] for name, item in all_hooks.items()}


def place(value: Any) -> Any:
    """Where an object that can be changed lies; None for one that can't, or that stands for itself alone."""
    if isinstance(value, torch.Tensor):
        try:
            pointer = value.untyped_storage().data_ptr()
        except (
            RuntimeError,
            NotImplementedError,
            ValueError,
        ):  # it has none, as before the first input of a lazy layer
            pointer = 0
        return ("memory", pointer) if pointer else id(value)
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        return ("memory", value.__array_interface__["data"][0]) if value.nbytes else id(value)
    if isinstance(value, CHANGEABLE) or (type(value).__dictoffset__ and not isinstance(value, CODE)):
        return id(value)
    return None


def _array(reader: "Reader", value: np.ndarray) -> str:
    layout = "" if value.flags.c_contiguous else value.strides
    head = f"{value.dtype.str} {value.dtype.descr if value.dtype.fields else ''} {value.shape} {layout}"
    if value.dtype.hasobject:
        return reader.join("array", head, reader.digest(np.ndarray.tolist(value)))
    if isinstance(value, np.ma.MaskedArray):
        return reader.join("array", head, reader.digest(np.asarray(value.data)), reader.digest(np.asarray(value.mask)))
    return reader.bytes(f"array {head}", np.ascontiguousarray(value).view(np.ndarray).tobytes())


def _tensor(reader: "Reader", value: torch.Tensor) -> str:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if value.grad_fn is not None:
            return reader.unknown(value, "has come from a computation that it keeps for its gradient (see .detach())")
        try:
            head = f"{value.dtype} {tuple(value.shape)} {value.device.type} {value.requires_grad} {value.layout}"
            if value.is_meta:
                content = ""
            elif value.is_quantized or value.layout not in (torch.strided, torch.sparse_coo):
                return reader.unknown(value)
            elif value.layout == torch.sparse_coo:
                whole = value.detach().coalesce()
                content = reader.all("sparse", (whole.indices(), whole.values()))
            else:
                head += "" if value.is_contiguous() else f" {value.stride()}"
                plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
                content = reader.bytes("dense", plain.reshape(-1).view(torch.uint8).numpy().data)
        except (RuntimeError, TypeError, NotImplementedError, ValueError):  # one that is not real, or not there yet
            return reader.unknown(value)
        rest = (value.grad if value.is_leaf else None, list((value._backward_hooks or {}).values()))
        return reader.join("tensor", head, content, reader.all("rest", rest))


def _ufunc(reader: "Reader", value: np.ufunc) -> str:
    for module in ("numpy", "scipy.special"):
        if origin.found(module, value.__name__) is value:
            return reader.foreign(module, value.__name__)
    return reader.unknown(value, "hides the function that it was made from")


def instance(reader: "Reader", value: Any) -> str:
    """An object by its class and its state, which is all that can be in it."""
    kind = type(value)
    if kind.__name__ == "OptimizedModule" and hasattr(value, "_orig_mod"):  # of torch.compile
        return reader.all("compiled", [value._orig_mod])
    if code_reading.is_global_generator(value):
        return reader.join("global generator", kind.__name__)
    if isinstance(value, torch.nn.Module) or origin.is_own(kind.__module__):
        if _has_hidden_state(value):
            return reader.unknown(value)
        arguments = reader.digest(value.args) if isinstance(value, BaseException) else ""
        return reader.join("instance", reader.digest(kind), _attributes(reader, value), arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            registered = copyreg.dispatch_table.get(kind)
            reduced = registered(value) if registered else value.__reduce_ex__(4)
    except Exception:
        return reader.unknown(value)
    if isinstance(reduced, str):
        return reader.foreign(kind.__module__, reduced)
    made, arguments, state, items, pairs = (*reduced[:5], *[None] * (5 - len(reduced[:5])))
    content = (kind, made, arguments, state, list(items or ()), list(pairs or ()))
    return reader.all("reduced", content)


def _has_hidden_state(value: Any) -> bool:
    """Whether an object has a base that is written in C, whose state is not among the attributes."""
    return any(not base.__flags__ & 1 << 9 and base not in PLAIN_BASES for base in type(value).__mro__)
