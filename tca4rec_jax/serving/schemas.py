"""What requests and answers look like; OpenAPI is made of these.

Items are ids or titles, as everywhere; a history is the oldest item first.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Items = Annotated[list[str], Field(min_length=1)]
Guidance = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, le=1e6, description="Weight of the CF model; 0: LLM alone."),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    guidance: Guidance | None = None


class RecommendRequest(_Request):
    """One `history` or several `histories`; the filters hold for all of them."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"history": ["Toy Story (1995)", "Fargo (1996)"], "k": 5}}
    )

    history: Items | None = None
    histories: Annotated[list[Items], Field(min_length=1)] | None = None
    k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Items of a list; by default 10, or the most that are searched for."
    )
    allow: Items | None = Field(None, description="Nothing else is recommended.")
    deny: list[str] = Field([], description="These are not recommended.")
    exclude_history: bool | None = Field(
        None, description="Whether items of the history are left out; by default as configured."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> "RecommendRequest":
        if (self.history is None) == (self.histories is None):
            raise ValueError("give either history or histories")
        return self

    @property
    def rows(self) -> list[list[str]]:
        """The histories."""
        return self.histories if self.history is None else [self.history]  # type: ignore[return-value]


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


class ReloadRequest(BaseModel):
    """The run to load; by default the one in use, anew."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: Annotated[str, Field(pattern=r"^[^/\x00]+$")] | None = None


class Error(BaseModel):
    """What is wrong, in one line."""

    error: str
