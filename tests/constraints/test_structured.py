"""Python types as constraints: what noise makes of them, the types accept."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import ipaddress
import json
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Annotated, Any, Generic, Literal, TypeVar

import pytest
from pydantic import (
    UUID4,
    AfterValidator,
    AliasPath,
    AwareDatetime,
    Base64Bytes,
    Base64Str,
    BaseModel,
    ByteSize,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    FileUrl,
    FutureDate,
    HttpUrl,
    ImportString,
    IPvAnyAddress,
    IPvAnyNetwork,
    Json,
    NaiveDatetime,
    NewPath,
    PastDate,
    PastDatetime,
    PostgresDsn,
    TypeAdapter,
    WithJsonSchema,
    field_validator,
)
from typing_extensions import TypedDict

from pymistral.engine.constraint import GrammarCompiler
from pymistral.engine.core import EngineCore
from pymistral.engine.types import EngineRequest
from pymistral.errors import RequestValidationError
from pymistral.requests import SamplingParams
from pymistral.requests.structured import StructuredOutput
from tests.engine.fakes import Collector

T = TypeVar("T")


class Color(Enum):
    RED = "red"
    BLUE = "dark blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 9


class City(BaseModel):
    name: str = Field(max_length=20, description="Its name")
    population: int = Field(ge=0, lt=10**8)
    area: Annotated[float, Field(gt=0, le=0.5)]
    color: Color = Color.RED
    founded: datetime.date | None = None


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: Level


class Square(BaseModel):
    kind: Literal["square"]
    side: int


class Drawing(BaseModel):
    shapes: list[Annotated[Circle | Square, Field(discriminator="kind")]] = Field(min_length=1, max_length=3)


class Tree(BaseModel):
    value: bool
    left: Tree | None
    right: Tree | None = None


class Plate(BaseModel):
    text: str = Field(pattern=r"^[A-Z]{1,3}-\d{3,4}$")
    old: bool = Field(deprecated=True)


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(max_length=2)


@dataclasses.dataclass
class Point:
    x: int
    y: int | None = None


class Price(BaseModel):
    """What pydantic reads is narrower than the schema that it writes."""

    amount: Decimal = Field(max_digits=6, decimal_places=2, ge=Decimal("0.1"))
    rate: Decimal | None = Field(default=Decimal("Infinity"), lt=Decimal("0.3"), multiple_of=Decimal("0.05"))
    times: float = Field(default=float("inf"), le=9, examples=[float("nan")])
    of: object = object()


class Raw(BaseModel):
    model_config = ConfigDict(val_json_bytes="base64")
    data: bytes


class Hashed(BaseModel):
    model_config = ConfigDict(val_json_bytes="hex")
    digest: bytes = Field(min_length=4, max_length=4)


class Bounded(BaseModel):
    model_config = ConfigDict(val_json_bytes="base64")
    data: bytes = Field(min_length=4, max_length=8)
    byte: bytes = Field(min_length=1, max_length=1)


class NoHash:
    """A validator that is an object, as `functools.partial` is, but has no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, value: str) -> str:
        return value


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)
    x: bool


class Lease(BaseModel):
    begin: datetime.date = Field(gt=datetime.date(2019, 12, 31), le=datetime.date(2024, 2, 29))
    end: datetime.date | None = Field(ge=datetime.date(1999, 5, 5))
    signed: datetime.date = Field(lt=datetime.date(1000, 1, 1))


class Options(TypedDict, total=False):
    verbose: bool
    level: Literal[1, 2, "three"]


TYPES: list[Any] = [
    *(City, Drawing, Tree, Plate, Page[City], Page[Point], Point, Options, Color, Level, bool, int),
    *(list[Color], dict[str, int], tuple[int, str, bool], set[Level], frozenset[bool], Literal["a", 2, None], int | list[bool] | None),
    *(datetime.date, datetime.time, datetime.datetime, uuid.UUID, ipaddress.IPv4Address, Decimal, Point | None, bytes),
    Annotated[list[int], Field(min_length=2, max_length=2)],
    Annotated[str, Field(min_length=3, max_length=3)],
    TypeAdapter(list[Point]),
    *(dict[Color, int], dict[int, bool], dict[float, bool], dict[bool, int], dict[datetime.date, int], dict[uuid.UUID, bool]),
    *(dict[Annotated[str, Field(pattern="^x+$")], bool], dict[Annotated[str, Field(max_length=3)], bool]),
    *(dict[Annotated[int, Field(ge=3, le=5)], bool], dict[Literal["a", "b"], bool], OrderedDict[int, bool]),
    *(NaiveDatetime, AwareDatetime, datetime.timedelta, UUID4, HttpUrl, FileUrl, PostgresDsn, complex, Price, Raw, Base64Bytes),
    *(ipaddress.IPv4Network, ipaddress.IPv6Network, ipaddress.IPv4Interface, IPvAnyAddress, IPvAnyNetwork),
    *(Fraction, set[tuple[int, bool]], set[Frozen], set[Any], PastDate, FutureDate, Lease),
    *(
        Annotated[float, Field(multiple_of=0.1)],
        Annotated[float, Field(multiple_of=0.3, ge=0)],
        Annotated[Decimal, Field(multiple_of="0.3")],
    ),
    *(ByteSize, Hashable, set[Hashable], Hashed, Bounded, Annotated[bytes, Field(min_length=2, max_length=3)]),
    Annotated[str, AfterValidator(NoHash())],
    *(Annotated[int, Field(multiple_of=7)], Annotated[Decimal, Field(decimal_places=1)], Annotated[Decimal, Field(decimal_places=12)]),
]


def test_types_accept_what_their_constraints_allow(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    core, compiler = noise
    answers = []
    for output in map(StructuredOutput, TYPES):
        grammar = compiler.compile(output.constraint)
        for seed in range(8):
            collector = Collector()
            core.add(core.prepare(EngineRequest([1], SamplingParams(max_len=900, seed=seed), constraint=grammar), collector))
            answers.append((output, collector))
    while core.busy:
        core.step()
    finished = [(output, collector.texts[0]) for output, collector in answers if collector.finished]
    assert len(finished) > 0.9 * len(answers)
    assert {output.name for output, _ in finished} == {output.name for output, _ in answers}
    for output, text in finished:
        if not re.search(r"[eE][+-]?\d{3}", text):  # JSON's numbers go further than Python's
            output.parse(text)


@pytest.mark.parametrize("type", [float, Any, list[float | None], dict[str, Any]])
@pytest.mark.parametrize("number", ["1e999", "-2.5E+310", "1" * 400])
def test_a_number_beyond_floats_is_not_infinity(type: Any, number: str) -> None:
    text = {list[float | None]: "[null, %s]", dict[str, Any]: '{"a": [%s]}'}.get(type, "%s") % number
    with pytest.raises(ValueError, match="is beyond Python's floats; give the type bounds"):
        StructuredOutput(type).parse(text)


def test_what_the_type_refuses_is_told_in_a_line() -> None:
    text = '{"shapes": [{"kind": "circle", "radius": 3}, {"kind": "line"}]}'
    with pytest.raises(ValueError, match=r"^shapes\.0\.circle\.radius: Input should be 1 or 9, got 3; shapes\.1: [^\n]*$") as refused:
        StructuredOutput(Drawing).parse(text)
    assert "errors.pydantic.dev" not in str(refused.value)


def test_what_comes_out() -> None:
    assert StructuredOutput(Point).parse('{"x": 1}') == Point(1)
    assert StructuredOutput(set[int]).parse("[1, 1, 2]") == {1, 2}
    assert StructuredOutput(list[Color]).parse('["dark blue"]') == [Color.BLUE]


def test_a_decimal_keeps_the_digits_before_its_point(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    for digits, places, text in ((8, 2, "123456.78"), (30, 20, "123456.5"), (None, 12, "-123456.5"), (40, 2, "1234567890123.45")):
        of = Annotated[Decimal, Field(max_digits=digits, decimal_places=places)]
        assert noise[1].compile(StructuredOutput(of).constraint).after(text.encode()) is not None
        assert str(StructuredOutput(of).parse(text)) == text


def test_types_that_cannot_be() -> None:
    class Callback(BaseModel):
        call: Callable[[int], int]

    class Looking(BaseModel):
        text: Annotated[str, Field(json_schema_extra={"not": {"const": "x"}})]

    class Fused(Enum):
        BOTH = (1, 2)

    class Far(BaseModel):
        near: int = Field(validation_alias=AliasPath("a", "b"))

    with pytest.raises(RequestValidationError, match="Callback has no JSON schema"):
        StructuredOutput(Callback)
    for no_schema, message in (
        (Fused, r"Fused has no JSON schema: the value \(1, 2\) cannot be read from JSON"),
        (Literal[b"x"], r"Literal\[b'x'\] has no JSON schema: the value b'x' cannot be read from JSON"),
        (list[type[int]], r"list\[type\[int\]\] has no JSON schema: .*a class \(int"),
        (Far, r"Far has no JSON schema: a validation_alias that is a path \(a\.b\) cannot be asked for; .*AliasChoices"),
        (Json[list[int]], "JSON text within a string; leave out Json"),
        (
            dict[tuple[int, int], int],
            r"dict\[tuple\[int, int\], int\]: .*'propertyNames' cannot be enforced while generating; leave it out",
        ),
        (range, "^range has no JSON schema: Unable to generate pydantic-core schema for <class 'range'>; give a type"),
    ):
        with pytest.raises(RequestValidationError, match=message) as refused:
            StructuredOutput(no_schema)
        assert "errors.pydantic.dev" not in str(refused.value)
    for no_type in ({"type": "object"}, "Give me a city", Point(1)):  # a schema, swapped arguments, an object
        with pytest.raises(RequestValidationError, match="give a type, as a class of BaseModel"):
            StructuredOutput(no_type)
    with pytest.raises(RequestValidationError, match=r"Looking: .*#/properties/text: 'not' cannot be enforced"):
        StructuredOutput(Looking)


class Item(BaseModel):
    x: int


Day = Annotated[datetime.date, Field(ge=datetime.date(2020, 12, 9), lt=datetime.date(2021, 1, 3))]


@pytest.mark.parametrize(
    ("type", "message"),
    [
        (Annotated[datetime.datetime, Field(gt=datetime.datetime(2020, 1, 1))], "datetime: .* at #: 'gt' of a datetime cannot be enforced"),
        (Annotated[datetime.time, Field(le=datetime.time(12))], "'le' of a time cannot be enforced .*; leave it out, and check the answer"),
        (Annotated[datetime.timedelta, Field(lt=datetime.timedelta(1))], "'lt' of a timedelta cannot be enforced"),
        (Annotated[Fraction, Field(gt=0)], "'gt' of a fraction cannot be enforced"),
        (Annotated[Decimal, Field(max_digits=3)], "max_digits of a decimal cannot be enforced .*; give both"),
        (list[PastDatetime], "at #/items: 'past' of a datetime cannot be enforced"),
        (Annotated[datetime.date, Field(gt=datetime.date(2020, 1, 1), lt=datetime.date(2020, 1, 2))], "no date lies within"),
        (Annotated[datetime.date, Field(gt=datetime.date.max)], "no date lies within its bounds"),
        (set[list[int]], "a set cannot hold list, which has no hash; give a list, or items that have one"),
        (tuple[Item, frozenset[tuple[int, Item | None]]], "at #/prefixItems/1: a set cannot hold Item, which has no hash"),
        (re.Pattern[str], "a regular expression cannot be enforced .*; give str"),
        (Base64Str, "base64 of text, and only of text, cannot be enforced .*; give str, or Base64Bytes"),
        (dict[str, FilePath], "at #/additionalProperties: what files there are on this machine .*; give pathlib.Path"),
        (dict[DirectoryPath, int], "its keys: what files there are on this machine"),
        (NewPath, "what files there are on this machine"),
        (ImportString, "an answer may not say what is imported; give Literal of the names"),
        (list[ImportString[int]], "at #/items: an answer may not say what is imported"),
        (Annotated[bytes, Field(min_length=4, max_length=3)], "no bytes are at least 4 and at most 3; change its bounds"),
    ],
)
def test_what_only_validation_could_tell_is_refused(type: Any, message: str) -> None:
    with pytest.raises(RequestValidationError, match=message):
        StructuredOutput(type)


@pytest.mark.parametrize(("type", "answer"), [(FilePath, __file__), (ImportString, "math.cos"), (ByteSize, "7 KB"), (Fraction, "1/3")])
def test_a_schema_that_the_user_gives_is_taken(noise: tuple[EngineCore, GrammarCompiler], type: Any, answer: str) -> None:
    output = StructuredOutput(list[Annotated[type, WithJsonSchema({"enum": [answer]})]])
    grammar = noise[1].compile(output.constraint)
    text = json.dumps([answer])
    assert grammar.after(text.encode()) is not None
    assert grammar.after(b'["0') is None
    output.parse(text)


@pytest.mark.parametrize("coding", ["utf8", "hex", "base64"])
@pytest.mark.parametrize(("least", "most"), [(0, 4), (3, 5), (4, 4), (5, None)])
def test_bytes_are_counted_not_characters(noise: tuple[EngineCore, GrammarCompiler], coding: str, least: int, most: int | None) -> None:
    bounds = Field(min_length=least, max_length=most)

    class Coded(BaseModel):
        model_config = ConfigDict(val_json_bytes=coding)  # type: ignore[typeddict-item]
        data: Annotated[bytes, bounds]

    grammar = noise[1].compile(StructuredOutput(Coded).constraint)
    for count in range(8):
        data = {"utf8": "x" * count, "hex": "e4" * count, "base64": base64.urlsafe_b64encode(b"\xe4" * count).decode()}[coding]
        after = grammar.after(f'{{"data": "{data}"}}'.encode())
        assert (after is not None) == (least <= count and (most is None or count <= most)), count


def test_the_days_between_bounds(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    grammar = noise[1].compile(StructuredOutput(Day).constraint)
    days = [datetime.date(2020, 12, 1) + datetime.timedelta(n) for n in range(60)]
    allowed = [day for day in days if grammar.after(f'"{day}"'.encode()) is not None]
    assert (allowed[0], allowed[-1], len(allowed)) == (datetime.date(2020, 12, 9), datetime.date(2021, 1, 2), 25)


def test_multiples_stay_where_floats_tell_them(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    output = StructuredOutput(Annotated[float, Field(multiple_of=0.1)])
    grammar = noise[1].compile(output.constraint)
    with pytest.raises(ValueError, match=r"multiple of 0\.1"):
        output.parse("8711977.7")  # it is one
    assert grammar.after(b"8711977.7") is None
    assert grammar.after(b"7999999.9") is not None


def test_a_type_without_values_is_named_with_its_field(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    class Order(BaseModel):
        notes: str
        amount: int = Field(ge=5, le=1)

    class Basket(BaseModel):
        orders: list[Order] = Field(min_length=1)

    message = r"^Basket: the json_schema constraint cannot be used: at #/\$defs/Order/properties/amount: Unsat.*minimum \(5\)"
    with pytest.raises(RequestValidationError, match=message):
        noise[1].compile(StructuredOutput(Basket).constraint)


def test_a_validator_has_the_last_word() -> None:
    class Even(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def even(cls, number: int) -> int:
            if number % 2:
                raise ValueError("it is odd")
            return number

    with pytest.raises(ValueError, match="it is odd"):
        StructuredOutput(Even).parse('{"number": 3}')
