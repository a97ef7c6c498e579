"""The OpenAI protocol, as OpenAI's own client sees it, from a coordinator with fake workers."""

import asyncio
import json
import logging

import pytest
from coordinator_harness import DECODE, PREFILL, System, running, until
from fake_worker import token_at

from baton.token_ids import count, unpack

SAYING = "Once upon a time there was a small house."
LONG = "count the words of this " * 40


def expected(system: System, prompt: list[int], count: int) -> str:
    return system.decode([token_at(prompt, index) for index in range(count)])


def test_a_completion_whole_and_streamed_is_the_workers_tokens_and_usage_counts_them(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            prompt = system.encode("def add(a, b):")
            whole = await system.openai.completions.create(model="demo", prompt="def add(a, b):", max_tokens=20)
            assert whole.choices[0].text == expected(system, prompt, 20)
            assert whole.choices[0].finish_reason == "length"
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 20)
            assert whole.usage.total_tokens == len(prompt) + 20
            assert whole.usage.prompt_tokens_details.cached_tokens == 3
            stream = await system.openai.completions.create(
                model="demo", prompt=prompt, max_tokens=20, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
            assert chunks[-2].choices[0].finish_reason == "length"
            assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
            assert all(chunk.usage is None for chunk in chunks[:-1])
            assert len({chunk.id for chunk in chunks}) == 1

    run(main())


def test_a_chat_ends_at_the_end_of_turn_which_is_not_shown(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker(token_at=system.says(SAYING))
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A story?"}]
            whole = await system.openai.chat.completions.create(model="demo", messages=messages)
            assert whole.choices[0].message.content == SAYING
            assert (whole.choices[0].message.role, whole.choices[0].finish_reason) == ("assistant", "stop")
            stream = await system.openai.chat.completions.create(model="demo", messages=messages, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAYING
            assert chunks[0].choices[0].delta.role == "assistant"
            assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
            assignment = system.workers[0].assignments[0]
            rendered = system.coordinator.intake.tokenizer.render_chat(messages, {})
            assert unpack(assignment.token_ids) == system.encode(rendered)
            assert assignment.sampling.max_tokens == 2048 - count(assignment.token_ids)

    run(main())


def test_an_answer_can_be_sent_back_as_part_of_the_conversation(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker(token_at=system.says(SAYING))
            messages: list = [
                {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]}
            ]
            messages.append({"role": "user", "content": "A story?"})
            answer = await system.openai.chat.completions.create(model="demo", messages=messages)
            messages.append(answer.choices[0].message)
            messages.append({"role": "user", "content": "More!"})
            await system.openai.chat.completions.create(model="demo", messages=messages)
            last = worker.assignments[-1]
            text = system.coordinator.intake.text(unpack(last.token_ids))
            assert text == (
                "<|system|>Be\nbrief<|end|><|user|>A story?<|end|>"
                f"<|assistant|>{SAYING}<|end|><|user|>More!<|end|><|assistant|>"
            )

    run(main())


def test_a_long_prompt_goes_to_both_workers_at_once_and_a_short_one_to_decode_alone(run) -> None:
    async def main() -> None:
        async with running() as system:
            prefill, decode = await system.worker("prefill-0", PREFILL), await system.worker()
            answer = await system.openai.completions.create(model="demo", prompt=LONG, max_tokens=5, seed=11)
            assert answer.choices[0].text == expected(system, system.encode(LONG), 5)
            (first,), (second,) = prefill.assignments, decode.assignments
            assert (first.role, second.role) == (PREFILL, DECODE)
            assert first.id == second.id
            assert first.decode.worker_id == decode.id
            assert first.decode.incarnation == decode.registration.incarnation
            assert second.prefill.handover_address == prefill.registration.handover_address
            assert not first.HasField("prefill")
            assert not second.HasField("decode")
            assert first.sampling == second.sampling
            assert first.sampling.seed == 11
            await system.openai.completions.create(model="demo", prompt="short", max_tokens=5)
            assert (len(prefill.assignments), len(decode.assignments)) == (1, 2)
            assert not decode.assignments[1].HasField("prefill")
            assert system.metric("baton_prefill_choice_total", choice="remote") == 1
            assert system.metric("baton_prefill_choice_total", choice="local_short_prompt") == 1

    run(main())


def test_the_first_token_reaches_the_client_while_decode_has_none(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker("prefill-0", PREFILL)
            decode = await system.worker()
            decode.pause_at = 0
            stream = await system.openai.completions.create(model="demo", prompt=LONG, max_tokens=5, stream=True)
            prompt = system.encode(LONG)
            chunk = await anext(aiter(stream))
            assert chunk.choices[0].text == system.decode([token_at(prompt, 0)])
            decode.go.set()
            rest = [chunk async for chunk in stream]
            assert chunk.choices[0].text + "".join(c.choices[0].text for c in rest) == expected(system, prompt, 5)

    run(main())


def test_one_token_from_prefill_ends_the_request_and_decode_is_told(run) -> None:
    async def main() -> None:
        async with running() as system:
            prefill = await system.worker("prefill-0", PREFILL)
            decode = await system.worker()
            decode.pause_at = 0
            answer = await system.openai.completions.create(model="demo", prompt=LONG, max_tokens=1)
            assert answer.usage.completion_tokens == 1
            await decode.wait_for(lambda: bool(decode.aborts))
            assert prefill.aborts == []

    run(main())


def test_a_hand_over_whose_lease_is_not_released_yet_is_not_cut_short_by_the_end_of_the_request(run) -> None:
    async def main() -> None:
        async with running() as system:
            prefill = await system.worker("prefill-0", PREFILL)
            await system.worker()
            prefill.keeps_lease = True
            for count in (1, 2):
                answer = await system.openai.completions.create(model="demo", prompt=LONG, max_tokens=3)
                assert answer.usage.completion_tokens == 3
                await prefill.wait_for(lambda count=count: len(prefill.assignments) == count)
            assert prefill.aborts == []
            assert system.coordinator.registry.workers["prefill-0"].legs == {}

    run(main())


def test_several_choices_and_prompts_are_independent_streams_with_their_own_seeds(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            answer = await system.openai.completions.create(
                model="demo", prompt=["one", "two"], n=2, max_tokens=4, seed=5
            )
            texts = [expected(system, system.encode(prompt), 4) for prompt in ("one", "one", "two", "two")]
            assert [choice.text for choice in answer.choices] == texts
            assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
            assert [assignment.sampling.seed for assignment in worker.assignments] == [5, 6, 5, 6]
            assert answer.usage.prompt_tokens == len(system.encode("one")) + len(system.encode("two"))
            assert answer.usage.completion_tokens == 16
            stream = await system.openai.completions.create(model="demo", prompt="one", n=2, max_tokens=4, stream=True)
            streamed = {0: "", 1: ""}
            async for chunk in stream:
                streamed[chunk.choices[0].index] += chunk.choices[0].text
            assert streamed == {0: texts[0], 1: texts[0]}

    run(main())


def test_a_stop_string_across_tokens_is_never_shown_and_ends_the_work(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker(token_at=system.says(SAYING + " The end." * 50))
            for stop in ("small house", ["zebra", "mall h"], [" a sm"]):
                needle = stop if isinstance(stop, str) else stop[-1]
                before = SAYING[: SAYING.index(needle)]
                worker.pause_at = len(system.encode(SAYING))
                whole = await system.openai.completions.create(model="demo", prompt="x", stop=stop, max_tokens=99)
                assert (whole.choices[0].text, whole.choices[0].finish_reason) == (before, "stop")
                stream = await system.openai.completions.create(
                    model="demo", prompt="x", stop=stop, max_tokens=99, stream=True
                )
                assert "".join([chunk.choices[0].text async for chunk in stream]) == before
            await worker.wait_for(lambda: len(worker.aborts) == 6)

    run(main())


def test_min_tokens_holds_off_stop_strings(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker(token_at=system.says("stop and stop again"))
            text = await system.openai.completions.create(
                model="demo",
                prompt="x",
                stop="stop",
                max_tokens=9,
                extra_body={"min_tokens": len(system.encode("stop"))},
            )
            assert text.choices[0].text == "stop and "

    run(main())


def test_logprobs_come_in_both_of_openais_forms(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker(token_at=system.says(SAYING))
            answer = await system.openai.completions.create(model="demo", prompt="x", logprobs=2, max_tokens=6)
            logprobs = answer.choices[0].logprobs
            text = answer.choices[0].text
            assert "".join(logprobs.tokens) == text
            for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
                assert text[at:].startswith(token)
            assert [round(value, 4) for value in logprobs.token_logprobs] == [-0.5, -0.51, -0.52, -0.53, -0.54, -0.55]
            assert [len(top) for top in logprobs.top_logprobs] == [2] * 6
            chat = await system.openai.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3, max_tokens=6
            )
            content = chat.choices[0].logprobs.content
            assert b"".join(bytes(entry.bytes) for entry in content).decode() == chat.choices[0].message.content
            assert [len(entry.top_logprobs) for entry in content] == [3] * 6
            assert content[0].top_logprobs[0].token == content[0].token
            none = await system.openai.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "x"}], max_tokens=6
            )
            assert none.choices[0].logprobs is None

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_aborts_the_request_in_both_workers_at_once(run, stream: bool) -> None:
    async def main() -> None:
        async with running() as system:
            prefill, decode = await system.worker("prefill-0", PREFILL), await system.worker()
            prefill.pause_at = 0 if not stream else None
            decode.pause_at = 2
            body = {"model": "demo", "prompt": LONG, "max_tokens": 50, "stream": stream}
            call = asyncio.create_task(system.http.post("/v1/completions", json=body))
            if stream:
                response = await call
                assert (await response.content.readline()).startswith(b"id: cmpl-")
                response.close()
            else:
                await decode.wait_for(lambda: bool(decode.assignments))
                call.cancel()
            started = asyncio.get_running_loop().time()
            await decode.wait_for(lambda: bool(decode.aborts), 2)
            if not stream:
                await prefill.wait_for(lambda: bool(prefill.aborts), 2)
            assert asyncio.get_running_loop().time() - started < 1
            assert system.coordinator.dispatcher.requests == {}
            assert system.metric("baton_requests_total", outcome="aborted") == 1

    run(main())


def test_more_streams_than_allowed_are_refused_with_429_and_when_to_come_back(run) -> None:
    async def main() -> None:
        async with running(max_requests=2) as system:
            worker = await system.worker()
            worker.pause_at = 1
            body = {"model": "demo", "prompt": "x", "n": 2, "max_tokens": 3}
            held = asyncio.create_task(system.http.post("/v1/completions", json=body))
            await worker.wait_for(lambda: len(worker.assignments) == 2)
            async with system.http.post("/v1/completions", json=body) as response:
                assert response.status == 429
                assert response.headers["Retry-After"]
                assert (await response.json())["error"]["type"] == "rate_limit_error"
            worker.go.set()
            assert (await held).status == 200
            async with system.http.post("/v1/completions", json=body) as response:
                assert response.status == 200
            async with system.http.post("/v1/completions", json=body | {"n": 3}) as response:
                assert response.status == 400

    run(main())


def test_a_request_that_takes_too_long_ends_with_504_and_in_a_stream_with_an_error_and_no_done(run) -> None:
    async def main() -> None:
        async with running(request_timeout_s=0.3) as system:
            worker = await system.worker()
            worker.pause_at = 1
            body = {"model": "demo", "prompt": "x", "max_tokens": 3}
            async with system.http.post("/v1/completions", json=body) as response:
                assert response.status == 504
            async with system.http.post("/v1/completions", json=body | {"stream": True}) as response:
                assert response.status == 200
                events = (await response.text()).strip().split("\n\n")
            assert json.loads(events[-1].rpartition("data: ")[2])["error"]["type"] == "timeout_error"
            assert 0 < worker.assignments[0].deadline_s <= 0.3
            await worker.wait_for(lambda: len(worker.aborts) == 2)

    run(main())


def test_models_tokenize_and_detokenize(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            models = await system.openai.models.list()
            assert [model.id for model in models.data] == ["demo"]
            assert (await system.openai.models.retrieve("demo")).id == "demo"
            text = "import os\n\u4e2d"
            async with system.http.post("/tokenize", json={"prompt": text}) as response:
                tokens = await response.json()
            assert (tokens["tokens"], tokens["count"]) == (system.encode(text), len(system.encode(text)))
            assert tokens["max_model_len"] == 2048
            async with system.http.post("/detokenize", json={"tokens": tokens["tokens"]}) as response:
                assert (await response.json())["prompt"] == text
            chat = {"messages": [{"role": "user", "content": "hi"}]}
            async with system.http.post("/tokenize", json=chat) as response:
                assert system.decode((await response.json())["tokens"]) == "hi"

    run(main())


def test_ready_means_that_a_worker_can_decode_and_health_only_that_we_live(run) -> None:
    async def main() -> None:
        async def status(path: str) -> int:
            async with system.http.get(path) as response:
                return response.status

        async with running() as system:
            assert (await status("/health"), await status("/ready")) == (200, 503)
            await system.worker("prefill-0", PREFILL)
            assert await status("/ready") == 503
            async with system.http.post("/v1/completions", json={"prompt": "x"}) as response:
                assert response.status == 503
                assert response.headers["Retry-After"]
            worker = await system.worker()
            assert await status("/ready") == 200
            worker.heartbeat.draining = True
            await worker.beat()
            await until(lambda: not system.coordinator.intake.ready)
            assert await status("/ready") == 503

    run(main())


def test_operators_see_workers_and_metrics_and_others_behind_a_proxy_do_not(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker("prefill-0", PREFILL)
            worker = await system.worker()
            async with system.http.get("/status") as response:
                decode, prefill = (await response.json())["workers"]
            assert (prefill["roles"], decode["id"], decode["pid"]) == (["prefill"], "decode-0", 4242)
            assert decode["incarnation"] == f"{worker.registration.incarnation:016x}"
            assert decode["blocks"]["total"] == 4096
            assert decode["heartbeat_age_s"] < 2
            async with system.http.get("/metrics") as response:
                text = await response.text()
            assert 'baton_worker_generated_tokens_total{worker="decode-0"} 7.0' in text
            assert 'baton_worker_blocks{state="free",worker="decode-0"} 4096.0' in text
            assert 'baton_worker_kv_tier_loaded_total{tier="host",worker="decode-0"} 3.0' in text
            assert 'baton_worker_kv_tier_bytes{tier="host",worker="decode-0"} 4096.0' in text
            assert 'tier="disk"' not in text, "this worker has none"
            assert 'baton_lane_in_use{lane="shm",peer="p",worker="decode-0"} 1.0' in text
            for path in ("/status", "/metrics"):
                async with system.http.get(path, headers={"X-Forwarded-For": "203.0.113.9"}) as response:
                    assert response.status == 403

    run(main())


def test_histograms_count_what_was_served(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            await system.openai.completions.create(model="demo", prompt="x", max_tokens=5)
            assert system.metric("baton_ttft_seconds_count") == 1
            assert system.metric("baton_itl_seconds_count") == 4
            assert system.metric("baton_request_seconds_bucket", le="+Inf") == 1
            assert system.metric("baton_completion_tokens_total") == 5
            assert system.metric("baton_requests_total", outcome="completed") == 1

    run(main())


def test_every_response_names_its_request_and_no_log_line_holds_a_prompt(run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            with caplog.at_level("DEBUG", logger="baton"):
                body = {"prompt": "SECRETWORD here", "max_tokens": 2}
                async with system.http.post("/v1/completions", json=body) as response:
                    assert response.headers["X-Request-Id"] == (await response.json())["id"]
                async with system.http.post("/v1/completions", json=body | {"temperature": -1}) as response:
                    assert response.headers["X-Request-Id"]
                async with system.http.post("/v1/completions", json={"prompt": [["SECRETWORD"]]}) as response:
                    assert response.status == 400
                async with system.http.get("/nowhere?SECRETWORD") as response:
                    assert response.headers["X-Request-Id"]

    run(main())
    text = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("baton"))
    assert "'/v1/completions' 200 cmpl-" in text
    assert "completion 2 tokens" in text
    assert "SECRETWORD" not in text


def test_a_salt_goes_to_every_worker_and_into_no_log(run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running() as system:
            workers = [await system.worker("prefill-0", PREFILL), await system.worker()]
            extra = {"cache_salt": "tenant-secret"}
            await system.openai.completions.create(model="demo", prompt=LONG, max_tokens=2, extra_body=extra)
            messages = [{"role": "user", "content": LONG}]
            await system.openai.chat.completions.create(model="demo", messages=messages, max_tokens=2, extra_body=extra)
            await system.openai.completions.create(model="demo", prompt=LONG, max_tokens=2)
            for worker in workers:
                assert [each.cache_salt for each in worker.assignments] == ["tenant-secret", "tenant-secret", ""]

    with caplog.at_level(logging.DEBUG):
        run(main())
    assert "tenant-secret" not in "".join(record.getMessage() for record in caplog.records if "baton" in record.name)


@pytest.mark.parametrize("salt", ['""', f'"{"x" * 257}"', "5", '["a"]', '"\\ud800"'])
def test_a_salt_that_is_no_name_of_a_tenant_is_refused(run, salt: str) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            headers = {"Content-Type": "application/json"}
            body = f'{{"prompt": "Hello", "max_tokens": 1, "cache_salt": {salt}}}'
            async with system.http.post("/v1/completions", data=body, headers=headers) as answer:
                assert answer.status == 400
                assert "xxx" not in await answer.text()

    run(main())
