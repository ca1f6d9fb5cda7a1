"""A model's answers: how they are read, and how they are held to what a request asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from tokenizers import Tokenizer

from kvasir.gateway.text.answer_parser import AnswerFormat, AnswerParser, ReasoningParser
from kvasir.gateway.text.call_grammars import call_grammar
from kvasir.gateway.text.tool_calls import ToolParser
from kvasir.gateway.text.tool_schemas import read_tools, schemas_of
from kvasir.protocol.client_messages import ChatMessage, ChatOptions
from kvasir.protocol.codec import MAX_TOKENS
from kvasir.protocol.errors import BadRequest
from kvasir.protocol.sampling import Grammar, ReasoningBudget


class Answers:
    """Reasoning and calls of tools in the answers of one model. Immutable.

    `reasoning`, `tools` and `marks` are those of its `AnswerFormat`.
    """

    def __init__(self, tokenizer: Tokenizer, form: AnswerFormat, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode`: token ids to text, special tokens by their names."""
        self.reasoning, self.tools, self.marks = form.reasoning, form.tools, form.marks
        self._tokenizer = tokenizer
        self._decode = decode

    def parser(
        self,
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        prompt_ids: Sequence[int],
        req_id: bytes = b"",
    ) -> AnswerParser | None:
        """Return what finds the parts of the answer to a conversation, None if it is all content.

        `options` are those that the template has taken, `prompt_ids` the last tokens of what came of it.
        """
        tools = self._tool_parser(options, req_id) if options.offers_tools else None
        marks = self.reasoning
        if marks is None or not options.separate_reasoning:
            return None if tools is None else AnswerParser(None, tools)
        is_open = self._is_reasoning_open(marks, messages, options, prompt_ids)
        reasoning = None if options.tool_choice == "required" else ReasoningParser(*marks, is_open=is_open)
        return AnswerParser(reasoning, tools, keep_reasoning=options.include_reasoning)

    def call_grammar(self, options: ChatOptions, content: Grammar | None) -> Grammar | None:
        """Return what holds the calls in an answer to their schemas, None if nothing does. `content`: the grammar of an
        answer without calls.

        Raises:
            BadRequest: as `read_tools` and `call_grammars.call_grammar`; or how the model calls tools is not known.
        """
        tools = read_tools(options.tools)
        if self.tools is None or not tools:
            return content  # if it has to call, rendering says why it cannot
        return call_grammar(self.tools, tools, options, content, self._special_ids)

    def forced(self, text: str, options: ChatOptions) -> str:
        """Return what makes the answer to the prompt `text` a call of a tool: how one begins, after any reasoning.

        Raises:
            BadRequest: how the model calls tools is not known, there are none to call, or `tool_name` is none of them.
        """
        names = schemas_of(read_tools(options.tools)) if options.offers_tools else {}
        if names and self.tools is None:
            raise BadRequest(
                "how this model calls tools is not known here; the operator can say so with --tool-parser",
                param="tools",
            )
        if options.tool_choice != "required":
            return ""
        if self.tools is None or not names or (options.tool_name and options.tool_name not in names):
            known = ", ".join(names) or "none"
            raise BadRequest(
                f"tool_choice asks for {options.tool_name or 'a tool'!r}; the tools are: {known}", param="tool_choice"
            )
        start, end = self.reasoning or ("", "")
        closing = f"{end}\n\n" if start and text.rstrip().endswith(start) else ""
        return closing + self.tools.opening(options.tool_name)

    def reasoning_budget(
        self, messages: Sequence[ChatMessage], options: ChatOptions, prompt_ids: Sequence[int]
    ) -> ReasoningBudget | None:
        """Return where the reasoning of an answer begins and ends, and after how many tokens it is ended at the latest;
        None: nothing is told apart, or not bounded where the options are lenient. Arguments as for `parser`.

        Raises:
            BadRequest: `options` bound the reasoning of a model that does none, or not between two tokens.
        """
        max_tokens, marks = options.max_reasoning_tokens, self.reasoning
        if options.tool_choice == "required":
            return None  # the call has begun in the prompt
        start, end = (None, None) if marks is None else map(self._tokenizer.token_to_id, marks)
        if marks is None or start is None or end is None:
            if max_tokens is None or options.is_lenient:
                return None
            raise BadRequest(
                "this model has no tokens that begin and end its reasoning; leave max_reasoning_tokens out",
                param="max_reasoning_tokens",
            )
        is_open = self._is_reasoning_open(marks, messages, options, prompt_ids)
        return ReasoningBudget(end, MAX_TOKENS if max_tokens is None else max_tokens, None if is_open else start)

    def _tool_parser(self, options: ChatOptions, req_id: bytes) -> ToolParser | None:
        schemas = schemas_of(read_tools(options.tools))
        if self.tools is None or not schemas:
            return None
        one_call = not options.parallel_tool_calls or bool(options.tool_name)
        parser = self.tools(schemas, one_call=one_call, req_id=req_id)
        if options.tool_choice == "required":
            parser.begin_with(parser.opening(options.tool_name))
        return parser

    def _is_reasoning_open(
        self,
        marks: tuple[str, str],
        messages: Sequence[ChatMessage],
        options: ChatOptions,
        prompt_ids: Sequence[int],
    ) -> bool:
        """Return whether the answer begins inside reasoning: the prompt has opened it and not closed it."""
        if self._decode(prompt_ids).rstrip().endswith(marks[0]):
            return True
        if not options.continue_final_message:
            return False
        content = messages[-1].content or ""
        return content.rfind(marks[0]) > content.rfind(marks[1])

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        """The special tokens among the marks."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: index for index, token in added if token.special and token.content in self.marks}
