"""A caller who asks for everything again and again keeps no server, and nobody else, busy with it."""

from __future__ import annotations

import asyncio
from typing import Any

from test_undecodable_answers import Connection, catalogue
from tritonclient.grpc import service_pb2 as pb


class Counting(Connection):
    """Answers when it is let, and knows how many questions there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.at_once = self.most = 0

    async def unary(self, *arguments: Any) -> Any:
        self.asked += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return await super().unary(*arguments)


async def test_few_questions_about_everything_are_asked_at_once_and_all_are_answered() -> None:
    connection = Counting()
    asked = catalogue(connection)
    statistics = [asked.model_statistics("", "") for _ in range(50)]
    indices = [asked.repository_index(pb.RepositoryIndexRequest()) for _ in range(50)]
    answers = await asyncio.gather(*statistics, *indices)
    assert len(answers) == connection.asked == 100
    assert connection.most <= 4


async def test_a_question_about_one_model_does_not_wait_for_them() -> None:
    connection = Counting()
    asked = catalogue(connection)
    hanging = asyncio.Event()

    async def hang(*_: Any) -> Any:
        await hanging.wait()
        return await Connection.unary(connection, "/RepositoryIndex", b"", (), None)

    connection.unary = hang  # type: ignore[method-assign]
    lists = [asyncio.create_task(asked.repository_index(pb.RepositoryIndexRequest())) for _ in range(10)]
    await asyncio.sleep(0)
    del connection.unary
    assert await asked.model_ready("p", "")
    hanging.set()
    await asyncio.gather(*lists)
