"""What requests and answers look like; OpenAPI is made of these.

Items are ids or titles, as everywhere; a history is the oldest item first.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Items = Annotated[list[str], Field(min_length=1)]
Guidance = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, le=1e6, description="Weight of the CF model; 0: LLM alone."),
]


def _whole(value: Any) -> Any:
    """2.0 as 2: both are integers in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)  # after the bounds of a field: OpenAPI has these only then


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    guidance: Guidance | None = None


class _ListRequest(_Request):
    k: Annotated[int, Field(ge=1), _WHOLE] | None = Field(
        None, description="Items of a list; by default 10, or the most that are searched for."
    )
    allow: Items | None = Field(None, description="Nothing else is recommended.")
    deny: list[str] = Field([], description="These are not recommended.")
    exclude_history: bool | None = Field(
        None, description="Whether items of the history are left out; by default as configured."
    )

    @property
    def filters(self) -> dict[str, Any]:
        """Those of Recommender.filter."""
        return self.model_dump(include={"allow", "deny", "exclude_history"})


def _given(name: str) -> dict[str, Any]:
    """The schema of an object with a list of this name; null counts as none."""
    return {"required": [name], "properties": {name: {"type": "array"}}}


class RecommendRequest(_ListRequest):
    """One `history` or several `histories`; the filters hold for all of them."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"history": ["Toy Story (1995)", "Fargo (1996)"], "k": 3},
            "oneOf": [_given("history"), _given("histories")],
        }
    )

    history: Items | None = None
    histories: Annotated[list[Items], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "RecommendRequest":
        if (self.history is None) == (self.histories is None):
            raise ValueError("give either history or histories")
        return self

    @property
    def rows(self) -> list[list[str]]:
        """The histories."""
        return self.histories if self.history is None else [self.history]  # type: ignore[return-value]


class ExplainRequest(_ListRequest):
    """A list to explain, and pairs of items: why the first stands before the second."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"history": ["Toy Story (1995)", "Fargo (1996)"], "k": 3}}
    )

    history: Items
    compare: Annotated[
        list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(max_length=8)
    ] = []
    children: Annotated[
        int,
        Field(ge=1, le=100, description="The best so many children of a branch are named."),
        _WHOLE,
    ] = 5
    leave_one_out: bool = Field(
        True, description="Score without each item of the history, too, which takes longer."
    )
    page: bool = Field(False, description="Answer with a page instead of JSON.")


class ScoreRequest(_Request):
    """Candidates from another system, to be ranked anew."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"history": ["Toy Story (1995)"], "candidates": ["100", "Heat (1995)"]}
        }
    )

    history: Items
    candidates: Items


class Item(BaseModel):
    """One item of the catalogue."""

    item_id: str
    title: str


class ScoredItem(Item):
    """One item of a list; the score is a log-probability, guidance included."""

    score: float


class Lists(BaseModel):
    """A list for each history, best first; shorter than k if fewer items may be recommended."""

    run: str
    lists: list[list[ScoredItem]]


class Scores(BaseModel):
    """A score for each candidate, in their order: log-probabilities, guidance included."""

    run: str
    scores: list[float]


class Explained(BaseModel):
    """The list and its decoding tree: docs/explanation.md."""

    run: str
    explanation: dict[str, Any]


class Found(BaseModel):
    """Items whose title has the text."""

    items: list[Item]


class About(BaseModel):
    """The state of the service: loading, ready or draining; and what it serves."""

    state: str
    run: str | None = None
    made_from: str | None = None
    run_before: str | None = None
    most_items: int | None = None
    guidance: float | None = None
    guided: bool | None = None
    explains: bool | None = None


class ReloadRequest(BaseModel):
    """The run to load; by default the one in use, anew."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: Annotated[str, Field(pattern=r"^[^/\x00]+$")] | None = None


class Error(BaseModel):
    """What is wrong, in one line."""

    error: str
