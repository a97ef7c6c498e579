"""The Inference service, beside the standard health and reflection services."""

import asyncio

import grpc
import pytest
from coordinator_harness import PREFILL, running
from fake_worker import token_at
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.token_ids import count, unpack
from baton.v1 import inference_pb2 as api

LONG = "count the words of this " * 40


def generate(**fields: object) -> api.GenerateRequest:
    sampling = fields.pop("sampling", {})
    return api.GenerateRequest(sampling=api.Sampling(**{"max_tokens": 6, **sampling}), **fields)


def test_generate_streams_tokens_text_and_at_last_the_usage(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker("prefill-0", PREFILL)
            await system.worker()
            responses = [r async for r in system.inference.Generate(generate(text=LONG, model="demo"))]
            prompt = system.encode(LONG)
            tokens = [token_at(prompt, index) for index in range(6)]
            assert [token for r in responses for token in r.token_ids] == tokens
            assert "".join(r.text for r in responses) == system.decode(tokens)
            assert [r.first_index for r in responses] == sorted({r.first_index for r in responses})
            assert responses[-1].finish_reason == api.FINISH_REASON_LENGTH
            assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
            usage = responses[-1].usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 6)
            assert len({r.request_id for r in responses}) == 1

    run(main())


def test_token_ids_chat_choices_logprobs_stops_and_special_tokens(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker(token_at=system.says("one two three"))
            ids = api.TokenIds(ids=system.encode("x"))
            chat = api.Chat(messages=[api.ChatMessage(role="user", content="hi")])
            by_choice = {0: "", 1: ""}
            ends = []
            async for r in system.inference.Generate(generate(chat=chat, n=2, sampling={"max_tokens": 50})):
                by_choice[r.choice] += r.text
                ends += [r.finish_reason] if r.finish_reason else []
            assert by_choice == {0: "one two three", 1: "one two three"}
            assert ends == [api.FINISH_REASON_STOP] * 2
            request = generate(token_ids=ids, stop=[" three"], sampling={"logprobs": 2, "seed": 3, "max_tokens": 50})
            responses = [r async for r in system.inference.Generate(request)]
            assert "".join(r.text for r in responses) == "one two"
            entries = [entry for r in responses for entry in r.logprobs]
            assert [entry.token_id for entry in entries] == [token for r in responses for token in r.token_ids]
            assert all(len(entry.alternatives) == 2 for entry in entries)
            assert worker.assignments[-1].sampling.seed == 3
            request = generate(token_ids=ids, keep_special_tokens=True, sampling={"max_tokens": 50})
            text = "".join([r.text async for r in system.inference.Generate(request)])
            assert text == "one two three<|end|>"

    run(main())


def test_without_max_tokens_the_rest_of_the_context_is_used(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker(token_at=system.says("ok"))
            request = api.GenerateRequest(text="hello")
            assert [r async for r in system.inference.Generate(request)]
            assignment = worker.assignments[0]
            assert assignment.sampling.max_tokens == 2048 - count(assignment.token_ids)

    run(main())


def test_cancelling_the_call_aborts_the_request(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.pause_at = 2
            call = system.inference.Generate(generate(text="hello"))
            assert (await call.read()).token_ids
            call.cancel()
            await worker.wait_for(lambda: bool(worker.aborts), 2)
            assert system.coordinator.dispatcher.requests == {}

    run(main())


def test_abort_by_id_ends_the_stream_and_is_idempotent(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            worker.pause_at = 2
            responses = aiter(system.inference.Generate(generate(text="hello")))
            first = await anext(responses)
            for _ in range(2):
                await system.inference.Abort(api.AbortRequest(request_id=first.request_id))
            rest = [r async for r in responses]
            assert rest[-1].finish_reason == api.FINISH_REASON_ABORTED
            assert rest[-1].HasField("usage")
            await worker.wait_for(lambda: bool(worker.aborts), 2)
            await system.inference.Abort(api.AbortRequest(request_id="nobody"))

    run(main())


def test_tokenize_detokenize_and_list_models(run) -> None:
    async def main() -> None:
        async with running() as system:
            await system.worker()
            tokens = await system.inference.Tokenize(api.TokenizeRequest(text="import os", add_special_tokens=True))
            assert list(tokens.token_ids) == system.encode("import os")
            assert tokens.max_model_tokens == 2048
            chat = api.Chat(messages=[api.ChatMessage(role="user", content="hi")])
            tokens = await system.inference.Tokenize(api.TokenizeRequest(chat=chat))
            text = await system.inference.Detokenize(api.DetokenizeRequest(token_ids=tokens.token_ids))
            assert text.text == "<|user|>hi<|end|><|assistant|>"
            models = await system.inference.ListModels(api.ListModelsRequest())
            assert [(model.id, model.max_model_tokens) for model in models.models] == [("demo", 2048)]

    run(main())


def test_without_a_worker_the_call_is_unavailable_and_with_too_many_exhausted(run) -> None:
    async def main() -> None:
        async def code(request: api.GenerateRequest) -> grpc.StatusCode:
            try:
                return [r async for r in system.inference.Generate(request)] and grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                return error.code()

        async with running(max_requests=1, request_timeout_s=1.0) as system:
            assert await code(generate(text="x")) is grpc.StatusCode.UNAVAILABLE
            worker = await system.worker()
            worker.pause_at = 1
            held = asyncio.create_task(code(generate(text="x")))
            await worker.wait_for(lambda: bool(worker.assignments))
            assert await code(generate(text="x")) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await held is grpc.StatusCode.DEADLINE_EXCEEDED

    run(main())


def test_health_follows_readiness(run) -> None:
    async def main() -> None:
        async with running() as system:
            health = health_pb2_grpc.HealthStub(system.channel)
            serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"))
            assert (await watch.read()).status == not_serving
            worker = await system.worker()
            assert (await watch.read()).status == serving
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving
            await worker.stop()
            assert (await watch.read()).status == not_serving
            watch.cancel()

    run(main())


def test_reflection_tells_what_is_served(run) -> None:
    async def main() -> None:
        async with running() as system:
            stub = reflection_pb2_grpc.ServerReflectionStub(system.channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {service.name for service in (await call.read()).list_services_response.service}
            assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names
            assert "baton.v1.WorkerLink" not in names
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Inference"))
            files = (await call.read()).file_descriptor_response.file_descriptor_proto
            assert FileDescriptorProto.FromString(files[0]).name == "baton/v1/inference.proto"
            await call.done_writing()

    run(main())


def test_a_prefix_is_pinned_looked_at_and_unpinned(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker(pinnable_blocks=20)
            tokens = system.encode(LONG)
            pin = await system.inference.CreatePin(api.CreatePinRequest(text=LONG, cache_salt="mine", ttl_s=60))
            assert (pin.tokens, pin.blocks) == (len(tokens), len(tokens) // 16)
            await worker.wait_for(lambda: bool(worker.pins))
            assert (unpack(worker.pins[pin.id].token_ids), worker.pins[pin.id].cache_salt) == (tokens, "mine")
            assert await system.inference.GetPin(api.PinId(id=pin.id)) == pin
            await system.inference.DeletePin(api.PinId(id=pin.id))
            await worker.wait_for(lambda: not worker.pins)
            for call, request, code in (
                (system.inference.GetPin, api.PinId(id=pin.id), grpc.StatusCode.NOT_FOUND),
                (system.inference.DeletePin, api.PinId(id=pin.id), grpc.StatusCode.NOT_FOUND),
                (system.inference.CreatePin, api.CreatePinRequest(), grpc.StatusCode.INVALID_ARGUMENT),
                (
                    system.inference.CreatePin,
                    api.CreatePinRequest(text=LONG, ttl_s=float("nan")),
                    grpc.StatusCode.INVALID_ARGUMENT,
                ),
                (system.inference.CreatePin, api.CreatePinRequest(text=LONG * 5), grpc.StatusCode.FAILED_PRECONDITION),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call(request)
                assert refused.value.code() is code

    run(main())


def test_a_salt_goes_to_the_worker_and_an_empty_one_is_refused(run) -> None:
    async def main() -> None:
        async with running() as system:
            worker = await system.worker()
            async for _ in system.inference.Generate(generate(text="Hello", cache_salt="mine")):
                pass
            async for _ in system.inference.Generate(generate(text="Hello")):
                pass
            assert [assignment.cache_salt for assignment in worker.assignments] == ["mine", ""]
            with pytest.raises(grpc.aio.AioRpcError, match="cache_salt") as refused:
                await system.inference.Generate(generate(text="Hello", cache_salt="")).read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(main())
