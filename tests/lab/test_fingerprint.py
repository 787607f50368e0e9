"""The name of a result changes with all that can change the result, and with nothing else."""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from polylib.lab import Sweep, store
from polylib.lab.fingerprint import content, fingerprint

HEAD = """
import abc, collections, contextlib, dataclasses, enum, functools, operator, types
import numpy as np, torch
from torch import nn
"""


def notebook(source):
    """The names of a notebook whose cells were executed."""
    space = {"__name__": "__main__"}
    exec(HEAD + textwrap.dedent(source), space)
    return space


def named(source):
    found = fingerprint(notebook(source)["run"])
    assert found.unread is None, found.unread
    return found.digest


# Each way in which code reaches a number, K, that stands somewhere in it. `run(1)` must depend on it.
WAYS = {
    "a global": "k = K\ndef run(x): return x * k",
    "a constant": "def run(x): return x * K",
    "a helper": "def f(x): return x * K\ndef run(x): return f(x)",
    "a helper of a helper": "def g(x): return x * K\ndef f(x): return g(x)\ndef run(x): return f(x)",
    "a default": "def run(x, k=K): return x * k",
    "a default by keyword": "def f(x, *, k=K): return x * k\ndef run(x): return f(x)",
    "a closure": "def make(k):\n    def run(x): return x * k\n    return run\nrun = make(K)",
    "a function inside": "def run(x):\n    def f(y): return y * K\n    return f(x)",
    "a comprehension": "def run(x): return sum(y * K for y in [x])",
    "a lambda in a dict": "fs = {'f': lambda x: x * K}\ndef run(x): return fs['f'](x)",
    "a function attribute": "def f(x): return x * f.k\nf.k = K\ndef run(x): return f(x)",
    "a method": "class H:\n    def f(self, x): return x * K\nh = H()\ndef run(x): return h.f(x)",
    "an attribute": "class H:\n    def f(self, x): return x * self.k\nh = H()\nh.k = K\ndef run(x): return h.f(x)",
    "a class attribute": "class H:\n    k = K\ndef run(x): return x * H.k",
    "an inherited method": """
        class A:
            def f(self, x): return x * K
        class B(A): pass
        b = B()
        def run(x): return b.f(x)""",
    "an instance made inside": "class H:\n    def f(self, x): return x * K\ndef run(x): return H().f(x)",
    "super": """
        class A:
            def f(self, x): return x * K
        class B(A):
            def f(self, x): return super().f(x)
        def run(x): return B().f(x)""",
    "a static method": "class H:\n    @staticmethod\n    def f(x): return x * K\ndef run(x): return H.f(x)",
    "a class method": "class H:\n    @classmethod\n    def f(cls, x): return x * K\ndef run(x): return H.f(x)",
    "a property": "class H:\n    @property\n    def k(self): return K\nh = H()\ndef run(x): return x * h.k",
    "a cached property": """
        class H:
            @functools.cached_property
            def k(self): return K
        def run(x): return x * H().k""",
    "a property of the reader's": """
        class Scaled:
            def __get__(self, owner, kind=None): return K
        class H: k = Scaled()
        def run(x): return x * H().k""",
    "an operator": "class H:\n    def __rmul__(self, x): return x * K\nh = H()\ndef run(x): return x * h",
    "__getattr__": "class H:\n    def __getattr__(self, name): return K\nh = H()\ndef run(x): return x * h.k",
    "a metaclass": """
        class Meta(type):
            def __mul__(cls, x): return x * K
        class H(metaclass=Meta): pass
        def run(x): return H * x""",
    "an abstract class": """
        class A(abc.ABC):
            @abc.abstractmethod
            def f(self, x): ...
        class B(A):
            def f(self, x): return x * K
        b = B()
        def run(x): return b.f(x)""",
    "slots": """
        class H:
            __slots__ = ("k",)
        h = H()
        h.k = K
        def run(x): return x * h.k""",
    "a bound method": "class H:\n    def f(self, x): return x * K\nf = H().f\ndef run(x): return f(x)",
    "a bound method of data": "f = [K].__getitem__\ndef run(x): return x * f(0)",
    "a callable object": "class H:\n    def __call__(self, x): return x * K\nrun = H()",
    "a method passed as run": "class H:\n    def run(self, x): return x * K\nrun = H().run",
    "a partial": "run = functools.partial(lambda x, k: x * k, k=K)",
    "the function of a partial": "run = functools.partial(lambda k, x: x * K, 0)",
    "a partial method": """
        class H:
            def f(self, k, x): return x * k
            g = functools.partialmethod(f, K)
        h = H()
        def run(x): return h.g(x)""",
    "lru_cache": "@functools.lru_cache\ndef f(x): return x * K\ndef run(x): return f(x)",
    "cache on run": "@functools.cache\ndef run(x): return x * K",
    "a decorator": """
        def twice(f):
            @functools.wraps(f)
            def inner(x): return f(x) * K
            return inner
        @twice
        def run(x): return x""",
    "what is decorated": """
        def plain(f):
            @functools.wraps(f)
            def inner(x): return f(x)
            return inner
        @plain
        def run(x): return x * K""",
    "a decorator that is a class": """
        class Decorated:
            def __init__(self, f): self.f = f
            def __call__(self, x): return self.f(x)
        @Decorated
        def run(x): return x * K""",
    "singledispatch": """
        @functools.singledispatch
        def f(x): return x
        @f.register
        def _(x: int): return x * K
        def run(x): return f(x)""",
    "a context manager": """
        @contextlib.contextmanager
        def scaled(): yield K
        def run(x):
            with scaled() as k: return x * k""",
    "a data class": """
        @dataclasses.dataclass
        class H: k: int = K
        def run(x): return x * H().k""",
    "a default factory": """
        @dataclasses.dataclass
        class H: k: list = dataclasses.field(default_factory=lambda: [K])
        def run(x): return x * H().k[0]""",
    "a data class's value": """
        @dataclasses.dataclass(frozen=True)
        class H: k: int
        h = H(K)
        def run(x): return x * h.k""",
    "a named tuple": "P = collections.namedtuple('P', 'k')\np = P(K)\ndef run(x): return x * p.k",
    "an enum": "class E(enum.Enum):\n    A = K\ndef run(x): return x * E.A.value",
    "an enum's member": "class E(enum.IntEnum):\n    A = K\ne = E.A\ndef run(x): return x * e",
    "nested containers": "c = {'a': [({'b': (1, K)},)]}\ndef run(x): return x * c['a'][0][0]['b'][1]",
    "a function in containers": "c = [{'a': (lambda x: x * K,)}]\ndef run(x): return c[0]['a'][0](x)",
    "a set": "c = {1, K}\ndef run(x): return x * sum(c)",
    "a key": "c = {K: 1}\ndef run(x): return x * next(iter(c))",
    "a counter": "c = collections.Counter({'a': K})\ndef run(x): return x * c['a']",
    "a default dict": "c = collections.defaultdict(lambda: K)\ndef run(x): return x * dict.copy(c).get(0, c[0])",
    "a deque": "c = collections.deque([K])\ndef run(x): return x * c[0]",
    "a subclass of dict": """
        class D(dict):
            def __missing__(self, key): return K
        d = D()
        def run(x): return x * d['a']""",
    "a subclass of float": """
        class F(float):
            def __mul__(self, x): return x * K
        f = F(1.0)
        def run(x): return f * x""",
    "a namespace": "n = types.SimpleNamespace(k=K)\ndef run(x): return x * n.k",
    "an array": "a = np.array([1, K])\ndef run(x): return x * int(a[1])",
    "an array of objects": "a = np.array([lambda x: x * K, None])\ndef run(x): return a[0](x)",
    "a tensor": "a = torch.tensor([1, K])\ndef run(x): return x * int(a[1])",
    "a view of a tensor": "a = torch.arange(9)[K:]\ndef run(x): return x * int(a[0])",
    "a module of torch": """
        class M(nn.Module):
            def forward(self, x): return x * K
        m = M()
        def run(x): return m(x)""",
    "a module inside a module": """
        class M(nn.Module):
            def forward(self, x): return x * K
        m = nn.Sequential(nn.Identity(), M())
        def run(x): return m(x)""",
    "a weight": """
        m = nn.Linear(1, 1, bias=False)
        nn.init.constant_(m.weight, K)
        def run(x): return float(m(torch.tensor([float(x)])))""",
    "a buffer": """
        m = nn.Module()
        m.register_buffer("k", torch.tensor(K))
        def run(x): return x * int(m.k)""",
    "a hook": """
        m = nn.Identity()
        m.register_forward_hook(lambda m, a, y: y * K)
        def run(x): return m(x)""",
    "a parametrization": """
        class P(nn.Module):
            def forward(self, w): return torch.full_like(w, K)
        m = nn.utils.parametrize
        l = nn.Linear(1, 1, bias=False)
        m.register_parametrization(l, "weight", P())
        def run(x): return float(l(torch.tensor([float(x)])))""",
    "a function of autograd": """
        class F(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): return x * K
            @staticmethod
            def backward(ctx, g): return g
        def run(x): return float(F.apply(torch.tensor(float(x))))""",
    "an optimizer": """
        o = torch.optim.SGD([torch.zeros(1)], lr=K)
        def run(x): return x * o.param_groups[0]["lr"]""",
    "vectorize": "f = np.vectorize(lambda x: x * K)\ndef run(x): return int(f(x))",
    "torch.compile": "f = torch.compile(lambda x: x * K, backend='eager')\ndef run(x): return int(f(x))",
    "a compiled module": """
        class M(nn.Module):
            def forward(self, x): return x * K
        m = torch.compile(M(), backend="eager")
        def run(x): return int(m(torch.tensor(x)))""",
    "torch.no_grad": "@torch.no_grad()\ndef f(x): return x * K\ndef run(x): return f(x)",
    "torch.func": """
        def f(x): return x * K
        g = torch.func.grad(f)
        def run(x): return float(g(torch.tensor(float(x))))""",
    "a generator's seed": "g = torch.Generator().manual_seed(K)\ndef run(x): return int(torch.randint(9**9, (), generator=g))",
    "numpy's generator": "g = np.random.default_rng(K)\ndef run(x): return int(g.integers(9**9))",
    "what replaces an own name": "import math\ndef sin(x): return x * K\ndef run(x): return sin(x)",
    "what replaces a built-in": "def abs(x): return x * K\ndef run(x): return abs(x)",
    "a mapped function": "def f(x): return x * K\ndef run(x): return list(map(f, [x]))[0]",
    "reduce": "def f(a, b): return a * b * K\ndef run(x): return functools.reduce(f, [x, 1])",
    "a generator function": "def g(x):\n    yield x * K\ndef run(x): return next(g(x))",
    "an annotation that is read": "def f(x: K): return x\ndef run(x): return x * f.__annotations__['x']",
    "a text": "t = 'KK'\ndef run(x): return t * x",
    "the name of a class": "class CK: pass\ndef run(x): return CK.__name__" if False else "def run(x): return f'{K}'",
    "a match": "def run(x):\n    match x:\n        case 1: return K",
    "an exception": """
        class E(Exception): k = K
        def run(x):
            try: raise E
            except E as e: return x * e.k""",
    "an iterator class": """
        class I:
            def __iter__(self): return self
            def __next__(self): return K
        def run(x): return next(I())""",
    "type()": "H = type('H', (), {'f': lambda self, x: x * K})\ndef run(x): return H().f(x)",
    "recursion": "def run(x): return K if x <= 0 else run(x - 1)",
    "mutual recursion": "def f(x): return K if x <= 0 else run(x - 1)\ndef run(x): return f(x)",
    "a walrus": "def run(x): return (k := K) * x",
    "a byte string": "b = bytes([K])\ndef run(x): return x * b[0]",
    "a range": "r = range(K)\ndef run(x): return x * len(r)",
    "a slice": "s = slice(0, K)\ndef run(x): return x * len(list(range(20))[s])",
    "an operator's getter": "g = operator.itemgetter(K)\ndef run(x): return x * g(range(20))",
}


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_in_anything_that_is_reached_changes_the_name(way):
    before, after = (WAYS[way].replace("K", number) for number in ("2", "3"))
    assert notebook(before)["run"](1) != notebook(after)["run"](1), "the example itself"
    assert named(before) == named(before)
    assert named(before) != named(after)
