"""Whatever the OpenAPI description allows, and much that it does not, gets an answer that the description has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from fake_core import FakeCore, FakeEngine
from hypothesis import HealthCheck, settings
from live import Live
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hinny.infer.limits import Limits
from hinny.infer.server.application import application
from hinny.infer.server.options import Options


def small_server() -> Live:
    return Live(FakeEngine(FakeCore(), Limits(sequences=4, context=64)), Options(name="fake"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with small_server().running() as live:
        yield live.url
        assert live.service.loop.failure is None
        assert live.service.loop.live == 0


schema = schemathesis.openapi.from_dict(application(small_server().service).openapi())


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(case: schemathesis.Case, url: str) -> None:
    case.call_and_validate(base_url=url, checks=[not_a_server_error, status_code_conformance, content_type_conformance,
                                                 response_schema_conformance])
