"""Run langchain-tests' standard suites on tiny models.

The integration suite runs twice. ``TestStructure`` uses a random model: every test whose outcome constrained decoding
guarantees is green on it. Tests that need a model to understand a question (call the tool that fits, with the number
that was named; answer in words after a tool's result) use the scripted engine of conftest in ``TestMeaning``: a model
of random weights, and one of 135M parameters too, cannot decide them reliably, and they then say nothing about the
integration.
"""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from langchain_tests.unit_tests.chat_models import ChatModelTests

from focus_integrations.langchain import ChatFocusLLM
from tests.langchain.conftest import ScriptedEngine, tiny_engine

RANDOM, SCRIPTED = tiny_engine(), tiny_engine(ScriptedEngine)
MEANING = "a random model does not know which call or answer is meant; TestMeaning runs it on the scripted engine"


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatFocusLLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "tiny"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return ({"FOCUSLLM_MODEL": "tiny", "FOCUSLLM_ADAPTER": "folder"}, {}, {"model": "tiny", "adapter": "folder"})


class _Integration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatFocusLLM

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> Any:
        kinds = ["cache_read_input", "cache_creation_input"]
        return {"invoke": kinds, "stream": kinds}

    def _with_documents(self, times: int, stream: bool) -> AIMessage:
        model = self.chat_model_class(**self.chat_model_params, documents=["the cat sat on the mat. " * 9])
        for _ in range(times):
            chunks = list(model.stream("who?")) if stream else [model.invoke("who?")]
            message = chunks[0]
            for chunk in chunks[1:]:
                message = message + chunk
        assert isinstance(message, AIMessage)
        return message

    def invoke_with_cache_creation_input(self, *, stream: bool = False) -> AIMessage:
        message = self._with_documents(1, stream)
        assert message.usage_metadata["input_token_details"]["cache_creation"] > 20
        return message

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        message = self._with_documents(2, stream)
        assert message.usage_metadata["input_token_details"]["cache_read"] > 20
        return message


@pytest.mark.slow
@pytest.mark.slow
class TestStructure(_Integration):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": RANDOM, "max_tokens": 110}

    @property
    def model_override_value(self) -> str:
        return RANDOM.loaded.name

    @pytest.mark.xfail(reason=MEANING)
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_tool_calling(self, model: BaseChatModel) -> None:
        super().test_tool_calling(model)

    @pytest.mark.xfail(reason=MEANING)
    async def test_tool_calling_async(self, model: BaseChatModel) -> None:
        await super().test_tool_calling_async(model)

    @pytest.mark.xfail(reason=MEANING)
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason=MEANING)
    def test_unicode_tool_call_integration(self, model: BaseChatModel) -> None:
        super().test_unicode_tool_call_integration(model, force_tool_call=True)


class TestMeaning(ChatModelTests):
    """The standard tests that ``TestStructure`` expects to fail, and those of conversations with tools."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatFocusLLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": SCRIPTED, "max_tokens": 160}

    test_tool_calling = ChatModelIntegrationTests.test_tool_calling
    test_tool_calling_async = ChatModelIntegrationTests.test_tool_calling_async
    test_agent_loop = ChatModelIntegrationTests.test_agent_loop
    test_unicode_tool_call_integration = ChatModelIntegrationTests.test_unicode_tool_call_integration
    test_bind_runnables_as_tools = ChatModelIntegrationTests.test_bind_runnables_as_tools
    test_tool_message_error_status = ChatModelIntegrationTests.test_tool_message_error_status
    test_structured_few_shot_examples = ChatModelIntegrationTests.test_structured_few_shot_examples
    test_tool_calling_with_no_arguments = ChatModelIntegrationTests.test_tool_calling_with_no_arguments
