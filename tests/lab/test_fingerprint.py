"""The name of a result changes with all that can change the result, and with nothing else."""

import copy
import importlib
import os
import subprocess
import sys
import textwrap

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
        nn.init.zeros_(l.weight)
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
    "a generator's seed": "g = torch.Generator().manual_seed(K)\ndef run(x): return torch.rand((), generator=g)",
    "numpy's generator": "g = np.random.default_rng(K)\ndef run(x): return int(g.integers(9**9))",
    "what replaces an own name": "import math\ndef sin(x): return x * K\ndef run(x): return sin(x)",
    "what replaces a built-in": "def abs(x): return x * K\ndef run(x): return abs(x)",
    "a mapped function": "def f(x): return x * K\ndef run(x): return list(map(f, [x]))[0]",
    "reduce": "def f(a, b): return a * b * K\ndef run(x): return functools.reduce(f, [x, 1])",
    "a generator function": "def g(x):\n    yield x * K\ndef run(x): return next(g(x))",
    "an annotation that is read": "def f(x: K): return x\ndef run(x): return x * f.__annotations__['x']",
    "a text": "t = 'KK'\ndef run(x): return t * x",
    "a formatted text": "def run(x): return f'{K}'",
    "the name of a class": "C = type('CK', (), {})\ndef run(x): return C.__name__",
    "the name of a function": "def f(): pass\nf.__name__ = 'fK'\ndef run(x): return f.__name__",
    "a docstring that is read": "def f():\n    'K'\ndef run(x): return x * int(f.__doc__)",
    "a docstring of a class": "class C:\n    'K'\ndef run(x): return x * int(C.__doc__)",
    "an annotation of a class": "class C:\n    a: K\ndef run(x): return x * C.__annotations__['a']",
    "a field's metadata": """
        @dataclasses.dataclass
        class H: k: int = dataclasses.field(default=0, metadata={"k": K})
        def run(x): return x * dataclasses.fields(H)[0].metadata["k"]""",
    "__init_subclass__": """
        class A:
            def __init_subclass__(cls): cls.k = K
        class B(A): pass
        def run(x): return x * B.k""",
    "__class_getitem__": """
        class A:
            def __class_getitem__(cls, x): return x * K
        def run(x): return A[x]""",
    "__del__ or any hidden method": """
        class A:
            def __len__(self): return K
        a = A()
        def run(x): return x * len(a)""",
    "a weak reference": """
        import weakref
        class A: pass
        a = A()
        a.k = K
        r = weakref.ref(a)
        def run(x): return x * r().k""",
    "a chain": "import itertools\ndef run(x): return x * next(itertools.islice(itertools.count(), K, None))",
    "a lambda's default": "f = lambda x, k=[K]: x * k[0]\ndef run(x): return f(x)",
    "a mapping proxy": "m = types.MappingProxyType({'k': K})\ndef run(x): return x * m['k']",
    "an ordered dict": "m = collections.OrderedDict(a=1, k=K)\ndef run(x): return x * m['k']",
    "a chain map": "m = collections.ChainMap({}, {'k': K})\ndef run(x): return x * m['k']",
    "a fraction": "import fractions\nq = fractions.Fraction(K, 7)\ndef run(x): return x * q",
    "a decimal": "import decimal\nq = decimal.Decimal(K)\ndef run(x): return x * q",
    "a path": "import pathlib\nq = pathlib.PurePosixPath('aK')\ndef run(x): return q.name",
    "a date": "import datetime\nq = datetime.date(2020, 1, K)\ndef run(x): return q.day",
    "a pattern": "import re\nq = re.compile('aK')\ndef run(x): return q.pattern",
    "a structured array": "a = np.array([(1, K)], 'i4,i4')\ndef run(x): return x * int(a['f1'][0])",
    "a masked array": "a = np.ma.array([1, 2, 3], mask=np.arange(3) == K - 1)\ndef run(x): return int(a.sum())",
    "a memory view": "m = memoryview(bytes([K]))\ndef run(x): return x * m[0]",
    "a sparse tensor": "a = torch.tensor([[0, K]]).to_sparse()\ndef run(x): return x * int(a.to_dense()[0, 1])",
    "a random state": "r = np.random.RandomState(K)\ndef run(x): return int(r.randint(9**9))",
    "Python's generator": "import random\nr = random.Random(K)\ndef run(x): return r.random()",
    "a distribution": "d = torch.distributions.Normal(0.0, K)\ndef run(x): return x * float(d.scale)",
    "a data set": "d = torch.utils.data.TensorDataset(torch.tensor([K]))\ndef run(x): return x * int(d[0][0])",
    "a loader": "d = torch.utils.data.DataLoader([1] * 6, batch_size=K)\ndef run(x): return x * len(d)",
    "an activation": "f = nn.LeakyReLU(K)\ndef run(x): return float(f(torch.tensor(-1.0)))",
    "a polynomial": "p = np.polynomial.Polynomial([K])\ndef run(x): return x * p(0)",
    "a wrapped torch function": "f = torch.vmap(lambda x: x * K)\ndef run(x): return int(f(torch.tensor([x]))[0])",
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
    "one object under two names": "a = [1]\nb = a if K == 2 else [1]\ndef run(x): return a is b",
    "one object in two places": "a = [1]\nb = {'a': a, 'b': a if K == 2 else [1]}\ndef run(x): return b['a'] is b['b']",
    "shared weights": """
        m = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
        for p in m.parameters(): nn.init.ones_(p)
        if K == 2: m[1][0].weight = m[0].weight
        def run(x): return len(list(m.parameters()))""",
    "the weights of an optimizer": """
        m = nn.Linear(1, 1)
        for p in m.parameters(): nn.init.ones_(p)
        o = torch.optim.SGD((m if K == 2 else __import__("copy").deepcopy(m)).parameters(), lr=1.0)
        def run(x): return o.param_groups[0]["params"][0] is m.weight""",
    "a view and a copy": "a = np.zeros(3)\nb = a[:] if K == 2 else a.copy()\ndef run(x): return np.shares_memory(a, b)",
    "a tensor's memory": "a = torch.zeros(3)\nb = a.view(3, 1)[:, 0] if K == 2 else a.clone()\n"
    "def run(x): return a.data_ptr() == b.data_ptr()",
    "the order of axes": "a = torch.ones(2, 2)\nif K == 2: a = a.t()\ndef run(x): return a.is_contiguous()",
    "the mode": "m = nn.Dropout()\nif K == 2: m.eval()\ndef run(x): return m.training",
    "what is frozen": "p = torch.ones(1, requires_grad=K == 2)\ndef run(x): return p.requires_grad",
    "the state of an optimizer": """
        w = torch.ones(1, requires_grad=True)
        o = torch.optim.SGD([w], lr=0.0, momentum=0.9)
        w.grad = torch.full((1,), float(K))
        o.step()
        w.grad = None
        def run(x): return float(o.state[w]["momentum_buffer"])""",
    "a method of one object": """
        m = nn.Module()
        m.f = types.MethodType(lambda self, x: x * K, m)
        def run(x): return m.f(x)""",
    "a forward of one object": "m = nn.Identity()\nm.forward = lambda x: x * K\ndef run(x): return m(x)",
    "what is put into a class of torch": """
        nn.ReLU6.own = staticmethod(lambda x: x * K)
        def run(x): return nn.ReLU6.own(x)""",
    "what is put into numpy": "np.own_name = lambda x: x * K\ndef run(x): return np.own_name(x)",
    "a generic class": """
        import typing
        T = typing.TypeVar("T")
        class H(typing.Generic[T]):
            def f(self, x): return x * K
        h = H[int]()
        def run(x): return h.f(x)""",
    "a protocol": """
        import typing
        @typing.runtime_checkable
        class P(typing.Protocol):
            def f(self, x): ...
        class H(P):
            def f(self, x): return x * K
        def run(x): return H().f(x)""",
    "singledispatchmethod": """
        class H:
            @functools.singledispatchmethod
            def f(self, x): return x
            @f.register
            def _(self, x: int): return x * K
        h = H()
        def run(x): return h.f(x)""",
    "total_ordering": """
        @functools.total_ordering
        class H:
            def __eq__(self, other): return False
            def __lt__(self, other): return K
        def run(x): return H() < x""",
    "a loader of an own data set": """
        class D(torch.utils.data.Dataset):
            def __getitem__(self, i): return i * K
            def __len__(self): return 3
        d = torch.utils.data.DataLoader(D())
        def run(x): return [int(v) for v in d]""",
    "a schedule": """
        o = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        s = torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: K)
        def run(x): return x * o.param_groups[0]["lr"]""",
    "scikit-learn": """
        from sklearn.linear_model import Ridge
        m = Ridge(alpha=K).fit([[1.0], [2.0]], [1, 2])
        def run(x): return float(m.predict([[x]])[0])""",
    "a number with an attribute": "class I(int): pass\ni = I(3)\ni.k = K\ndef run(x): return x * i.k",
    "__set_name__": """
        class D:
            def __set_name__(self, owner, name): self.k = K
            def __get__(self, owner, kind): return self.k
        class H: d = D()
        def run(x): return x * H.d""",
    "__new__": "class H:\n    def __new__(cls, x): return x * K\ndef run(x): return H(x)",
    "a bound method of text": "f = 'K{}'.format\ndef run(x): return f(x)",
    "a coroutine": """
        async def f(x): return x * K
        def run(x):
            try: f(x).send(None)
            except StopIteration as end: return end.value""",
    "another order of bytes": "a = np.array([1], '<i4' if K == 2 else '>i4')\ndef run(x): return a.tobytes()",
    "long texts": "a = np.array(['a' * 60 + 'K'])\ndef run(x): return a[0]",
}


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_in_anything_that_is_reached_changes_the_name(way):
    before, after = (WAYS[way].replace("K", number) for number in ("2", "3"))
    assert notebook(before)["run"](1) != notebook(after)["run"](1), "the example itself"
    assert named(before) == named(before)
    assert named(before) != named(after)


# What a piece of code that reaches `inner` looks like, so that ways can be chained; `out` is its own name.
LINKS = [
    "def out(x): return inner(x)",
    "out = functools.partial(lambda f, x: f(x), inner)",
    "@functools.lru_cache\ndef out(x): return inner(x)",
    "class out_c:\n    def f(self, x): return inner(x)\nout = out_c().f",
    "class out_b:\n    def __call__(self, x): return inner(x)\nclass out_c(out_b): pass\nout = out_c()",
    "class out_c:\n    @property\n    def p(self): return inner\nout_i = out_c()\ndef out(x): return out_i.p(x)",
    "class out_c:\n    @functools.cached_property\n    def p(self): return inner\ndef out(x): return out_c().p(x)",
    "class out_c:\n    @classmethod\n    def f(cls, x): return inner(x)\ndef out(x): return out_c.f(x)",
    "class out_c:\n    __slots__ = ('f',)\nout_i = out_c()\nout_i.f = inner\ndef out(x): return out_i.f(x)",
    "def out(x, f=inner): return f(x)",
    "def out(x, *, f={'f': [inner]}): return f['f'][0](x)",
    "def out_m(f):\n    def g(x): return f(x)\n    return g\nout = out_m(inner)",
    "def out_m(f):\n    @functools.wraps(f)\n    def g(*a, **k): return f(*a, **k)\n    return g\n"
    "@out_m\ndef out(x): return inner(x)",
    "out_d = {1: ({'a': [inner]},)}\ndef out(x): return out_d[1][0]['a'][0](x)",
    "@dataclasses.dataclass\nclass out_c:\n    f: object = inner\nout_i = out_c()\ndef out(x): return out_i.f(x)",
    "out_n = collections.namedtuple('out_n', 'f')(inner)\ndef out(x): return out_n.f(x)",
    "out_s = types.SimpleNamespace(f=inner)\ndef out(x): return out_s.f(x)",
    "class out_c(nn.Module):\n    def forward(self, x): return inner(x)\nout = nn.Sequential(nn.Identity(), out_c())",
    "class out_c(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.f = inner\n"
    "    def forward(self, x): return self.f(x)\nout = out_c()",
    "class out_c(dict):\n    def __missing__(self, k): return inner\nout_i = out_c()\ndef out(x): return out_i['a'](x)",
    "out_v = np.vectorize(inner, otypes=[int])\ndef out(x): return int(out_v(x))",
    "def out(x):\n    def f(y): return [inner(z) for z in (y,)]\n    return f(x)[0]",
    "def out_g(x):\n    yield inner(x)\ndef out(x): return next(out_g(x))",
    "@torch.no_grad()\ndef out(x): return inner(x)",
    "@contextlib.contextmanager\ndef out_w(): yield inner\ndef out(x):\n    with out_w() as f: return f(x)",
    "@functools.singledispatch\ndef out(x): return 0\nout.register(int)(lambda x: inner(x))",
    "out_f = lambda x: 0\nout_f.f = inner\ndef out(x): return out_f.f(x)",
    "out_p = types.ModuleType('out_p')\nout_p.f = inner\ndef out(x): return out_p.f(x)",
    "out_p = types.ModuleType('out_p')\nout_p.f = inner\nout_l = [out_p]\ndef out(x): return out_l[0].f(x)",
    "class out_m(type):\n    def __call__(cls, x): return inner(x)\nclass out(metaclass=out_m): pass",
]
ENDS = [
    "def inner(x): return x + K",
    "inner_k = K\ndef inner(x): return x + inner_k",
    "inner_k = np.array([K])\ndef inner(x): return x + int(inner_k[0])",
    "inner_k = nn.Linear(1, 1)\nnn.init.constant_(inner_k.bias, K)\nnn.init.zeros_(inner_k.weight)\n"
    "def inner(x): return x + int(inner_k.bias)",
    "def inner(x, k=K): return x + k",
    "inner_d = {'a': [(1, {K})]}\ndef inner(x): return x + sum(inner_d['a'][0][1])",
]


@st.composite
def notebooks(draw):
    """The source of a notebook with one number, K, that its `run` reaches over several links, beside others."""
    cells, heads = [], []
    for branch in range(draw(st.integers(1, 2))):
        name = f"n{branch}_0"
        number = "K" if branch == 0 else str(draw(st.integers(0, 9)))
        cells.append(draw(st.sampled_from(ENDS)).replace("inner", name).replace("K", number))
        for depth, link in enumerate(draw(st.lists(st.sampled_from(LINKS), max_size=4))):
            cells.append(link.replace("inner", name).replace("out", name := f"n{branch}_{depth + 1}"))
        heads.append(f"{name}(x)")
    return "\n".join([*cells, f"def run(x): return {' + '.join(draw(st.permutations(heads)))}"])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(notebooks(), st.integers(0, 9), st.integers(0, 9), st.sampled_from(LINKS + ENDS))
def test_any_edit_that_is_reached_changes_the_name_and_nothing_else_does(source, one, other, beside):
    hypothesis.assume(one != other)
    before, after = source.replace("K", str(one)), source.replace("K", str(other))
    space = notebook(before)
    name = named(before)
    assert space["run"](1) != notebook(after)["run"](1), "the example itself"
    assert fingerprint(space["run"]).digest == name  # running it changes nothing
    assert named(after) != name
    unreached = beside.replace("inner", "abs").replace("out", "beside").replace("K", "5")
    assert named(f"{unreached}\n\n{before}\n# and a comment") == name


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.0, -0.0, 1.0, 0.1, float("inf"), 1 + 0j, "", "1", "a", b"", b"1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["a", "b", 1, (1,)]), inner, max_size=3)
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(PLAIN, PLAIN)
def test_data_have_the_same_name_when_they_read_the_same(one, other):
    assert content(copy.deepcopy(one)) == content(one) is not None
    assert (content(one) == content(other)) == (repr(one) == repr(other))


MODULE_WAYS = {
    "import helpers\ndef run(x): return helpers.f(x)": "def f(x): return x * K",
    "from helpers import f\ndef run(x): return f(x)": "def f(x): return x * K",
    "from helpers import f\ndef run(x): return f(x) + 1": "def g(x): return x * K\ndef f(x): return g(x)",
    "def run(x):\n    import helpers\n    return helpers.f(x)": "def f(x): return x * K",
    "def run(x):\n    from helpers import f\n    return f(x)": "k = K\ndef f(x): return x * k",
    "def run(x):\n    from helpers import *\n    return x": "k = K",
    "import polylib_helpers as h\ndef run(x): return h.f(x)": "def f(x): return x * K",
    "import numpy_own.inner\ndef run(x): return numpy_own.inner.f(x)": "def f(x): return x * K",
    "import helpers\nhs = [helpers]\ndef run(x): return hs[0].f(x)": "def f(x): return x * K",
    "import helpers\ndef run(x): return getattr(helpers, 'f')(x)": "def f(x): return x * K",
    "import helpers\nh = helpers.H()\ndef run(x): return h.f(x)": "class H:\n    def f(self, x): return x * K",
    "from helpers import H\nclass B(H): 0\ndef run(x): return B().f(x)": "class H:\n    def f(self, x): return x * K",
}


@pytest.mark.parametrize("cell", MODULE_WAYS)
def test_an_edit_in_a_module_of_the_readers_changes_the_name(cell, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = ("helpers", "polylib_helpers", "numpy_own", "numpy_own.inner")
    (tmp_path / "numpy_own").mkdir()
    (tmp_path / "numpy_own" / "__init__.py").write_text("")

    def name_with(number):
        for file in ("helpers.py", "polylib_helpers.py", "numpy_own/inner.py"):
            (tmp_path / file).write_text(MODULE_WAYS[cell].replace("K", number))
        for name in names:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return named(cell.replace("import *", "import k"))

    try:
        assert name_with("2") == name_with("2") != name_with("3")
    finally:
        for name in names:
            sys.modules.pop(name, None)


def test_a_function_as_a_knobs_value_counts_by_its_content():
    def shown(source):
        space = notebook(source)
        return Sweep(lambda f: {"y": f(2)}, {"f": [space["f"], abs]}, lambda r, p: go.Figure()).result(f=space["f"])

    k = ("def f(x): return x * {}", "k = {}\ndef f(x): return x * k", "class F:\n    def __call__(self, x): return {}")
    assert [int(shown(source.format(n))["y"]) for source in k[:2] for n in (2, 3, 2)] == [4, 6, 4] * 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import threading\nlock = threading.Lock()\ndef run(x):\n    with lock: return x", "lock, a lock, which"),
        ("g = (k for k in range(3))\ndef run(x): return next(g)", "g, a generator, which"),
        ("def run(x): return eval('x')", "eval, a builtin"),
        ("import sys\ndef run(x): return sys._getframe().f_back", "_getframe"),
        ("m = torch.nn.LazyLinear(2)\ndef run(x): return m(torch.ones(1, x))", "an UninitializedParameter, which"),
        ("t = torch.nested.nested_tensor([torch.ones(1)])\ndef run(x): return t", "t, a Tensor, which"),
        ("f = open('/dev/null')\ndef run(x): return f.read()", "f, a TextIOWrapper, which"),
        ("f = torch.jit.trace(lambda x: x * 2, torch.ones(1))\ndef run(x): return f(torch.ones(x))", "f, a ScriptF"),
        (
            "class H: pass\nh = H()\nh.g = iter([1])\nh.h = (k for k in [1])\ndef run(x): return h",
            "h, a generator, which",
        ),
    ],
)
def test_what_can_not_be_read_is_named_and_not_kept(source, words):
    run = notebook(source)["run"]
    assert words in (fingerprint(run).unread or "all is read")
    with pytest.warns(UserWarning, match="not kept on disk: run depends on"):
        Sweep(lambda x: {"y": str(run(x))[:3]}, {"x": [1]}, lambda r, p: go.Figure()).result(x=1)
    assert not list(store.cache_folder().rglob("*.pkl"))


def test_a_cached_helper_that_keeps_results_of_older_code_is_said():
    space = notebook("k = 2\n@functools.lru_cache\ndef f(x): return x * k\ndef run(x): return f(x)")
    assert fingerprint(space["run"]).unread is None
    space["run"](1)
    space["k"] = 3  # f(1) still gives 2
    assert "keeps results of older code" in fingerprint(space["run"]).unread
    space["f"].cache_clear()
    assert fingerprint(space["run"]).unread is None


def test_what_packages_hold_does_not_count_by_its_state():
    run = notebook("def run(x): return np.random.rand() + float(torch.rand(())) + len(os.environ)\nimport os")["run"]
    before = fingerprint(run).digest
    run(1)
    assert fingerprint(run).digest == before


SHARED = """
import re, pathlib, datetime
words = {"b", "a", "c", frozenset({"x", "y"})}
pattern = re.compile("a+")
class H:
    words = {"q", "w"}
    def f(self, x): return x if x in {"one", "two", "three"} else len(self.words)
h = H()
m = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
for p in m.parameters(): nn.init.ones_(p)
m[0].register_forward_hook(lambda m, a, y: y)
generator = torch.Generator().manual_seed(3)
@dataclasses.dataclass
class D: f: object = len
def run(x): return [h.f(x), words, pattern.match("a"), m, D(), np.linspace(0, 1, 3), generator, pathlib.Path("a")]
"""


def test_another_process_gives_the_same_name():
    code = "from polylib.lab.fingerprint import fingerprint\nspace = {'__name__': '__main__'}\n" + textwrap.dedent(
        f"""
        exec({HEAD + SHARED!r}, space)
        handles = [space["m"].register_forward_hook(print) for _ in range(3)]
        [handle.remove() for handle in handles]
        print(fingerprint(space["run"]).digest)
        """
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == named(SHARED)


@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: np.seterr(all="ignore"),
        lambda: torch.set_float32_matmul_precision("medium"),
    ],
)
def test_settings_of_the_whole_notebook_count(setting):
    run = notebook("def run(x): return x")["run"]
    before = fingerprint(run).digest
    kept = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        with np.errstate():
            setting()
            assert fingerprint(run).digest != before
    finally:
        torch.set_grad_enabled(kept[0])
        torch.set_default_dtype(kept[1])
        torch.set_float32_matmul_precision(kept[2])
    assert fingerprint(run).digest == before
