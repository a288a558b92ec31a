"""Pickles of plain data: nothing is imported, and no key is hashed before it is known to be plain."""

import io
import pickle
import reprlib
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE
    TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""
"""What arrays, tensors and containers are pickled with: no sets, no buffers of a stated length, no instances."""

_Unpickler: Any = vars(pickle)["_Unpickler"]  # the one in Python, whose steps can be checked


def check_key(key: Any) -> None:
    """Refuse what may take forever to hash: a tuple of tuples that each hold another twice."""
    if not isinstance(key, str | bytes | int | float) and type(key).__hash__ is not object.__hash__:
        raise pickle.UnpicklingError(f"it has the key {reprlib.repr(key)}, expected strings or numbers")


class PlainUnpickler(_Unpickler):
    """Containers, numbers, strings, and whatever `find_class` of a subclass gives in the place of a class.

    A pickle can call what it gives and, where that has `__setstate__`, hand over a state; nothing else of it.
    """

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:  # of the table of steps
            raise pickle.UnpicklingError(f"its opcode {error} is none that plain data needs") from error

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a pickled {module}.{name}")

    def load_setitem(self) -> None:
        check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:  # the stack holds keys and values since the last mark
        for key in self.stack[::2]:
            check_key(key)
        super().load_setitems()

    def load_dict(self) -> None:
        for key in self.stack[::2]:
            check_key(key)
        super().load_dict()

    def load_build(self) -> None:
        if not hasattr(type(self.stack[-2]), "__setstate__"):
            raise pickle.UnpicklingError(f"it gives {reprlib.repr(self.stack[-2])} a state")
        super().load_build()


PlainUnpickler.dispatch = {
    code: _Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES.split())
} | {
    pickle.SETITEM[0]: PlainUnpickler.load_setitem,
    pickle.SETITEMS[0]: PlainUnpickler.load_setitems,
    pickle.DICT[0]: PlainUnpickler.load_dict,
    pickle.BUILD[0]: PlainUnpickler.load_build,
}


BYTES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
BYTES |= {"Bool": 1, "Untyped": 1, "ComplexFloat": 8, "ComplexDouble": 16}
"""Of an element of torch's storages, by what stands before `Storage` in their name."""


def load_plain(path: str) -> Any:
    """`torch.load` of a file that is made of tensors and plain values alone; raises whatever is wrong with another.

    Before torch reads it, its sizes are compared with the file's and its pickle is gone through: nothing in it is
    executed, no storage is larger than what is there, no key takes forever to hash.
    """
    import torch  # here, because those who read label files alone do not need it

    with open(path, "rb") as file:
        _check_sizes(file)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_sizes(file: BinaryIO) -> None:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":  # of torch 1.5 and before: what it is, the content, names of storages, these
        file.seek(0)
        for _ in range(5):
            _DryRun(file, lambda key, absent: size).load()
        return
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.lower(): entry for entry in archive.infolist()}  # torch does not heed the case either
        total = sum(entry.file_size for entry in archive.infolist())
        if total > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise pickle.UnpicklingError(f"it unpacks to {total} bytes and has {size}, but torch packs nothing")
        if len(entries) < len(archive.infolist()):
            raise pickle.UnpicklingError("it has entries of one name")
        if damaged := archive.testzip():  # torch does not look at the sums
            raise pickle.UnpicklingError(f"its entry {damaged} is damaged")
        for name in entries:
            folder, found, _ = name.rpartition("data.pkl")
            if found:
                present = {n.removeprefix(f"{folder}data/"): entry.file_size for n, entry in entries.items()}
                _DryRun(io.BytesIO(archive.read(entries[name])), present.get).load()


class _Made:
    """Stands in for whatever a pickle of torch makes by calling; nothing is done."""

    def __init__(self, *arguments: Any) -> None:
        ordered = type(self).__name__ == "OrderedDict"
        for item in (item for argument in arguments if isinstance(argument, list | tuple) for item in argument):
            if isinstance(item, list | tuple):  # what a set or a dict is made of is hashed
                check_key(item[0] if ordered and len(item) == 2 else item)

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _DryRun(PlainUnpickler):
    """Goes through a pickle of torch without making anything of it; `present` tells the bytes of a storage by name."""

    def __init__(self, file: Any, present: Callable[[str, int], int]) -> None:
        super().__init__(file, encoding="latin1")
        self.present = present

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Made,), {})

    def load_newobj(self) -> None:  # for torch to refuse, which names the class
        arguments, made = self.stack.pop(), self.stack.pop()
        self.append(made(*arguments))

    def persistent_load(self, given: Any) -> _Made:
        _, kind, key, _, count, *_ = given
        kind = getattr(kind, "__name__", "")
        width = BYTES.get(kind.removesuffix("Storage"))
        sound = width is not None and isinstance(count, int) and isinstance(key, str)
        if not sound or not 0 <= count * width <= self.present(key, 0):
            raise pickle.UnpicklingError(f"it lacks the {reprlib.repr(count)} elements of a {kind} that it speaks of")
        return _Made()


_DryRun.dispatch = PlainUnpickler.dispatch | {pickle.NEWOBJ[0]: _DryRun.load_newobj}
