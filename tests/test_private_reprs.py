"""What people say is in no `repr`, so that no log line or traceback has it by accident."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tidegate.api.admission import Knock
from tidegate.api.answers import Said
from tidegate.api.context_policy import Fitted
from tidegate.api.schema import Call, Message, read_chat
from tidegate.api.tools import Tool, ToolCall, ToolDelta
from tidegate.cloud.access_settings import AccessSettings
from tidegate.edge.semantic_cache import Question
from tidegate.engine.choosing import Ask, Choice
from tidegate.engine.drafts import Draft, Ended, Wish
from tidegate.engine.events import Finished, ScoredToken, TextDelta, Timing, TokenLogprob, Usage
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.history import History
from tidegate.engine.request import Constraint, GenerationRequest, RequestId, SamplingParams
from tidegate.engine.sampling import Draw, Sampled

SECRET, TOKEN = "hunter2", 31_337
IDS = np.array([TOKEN], np.int64)
PARAMS = SamplingParams(max_tokens=1, stop=(SECRET,))
SCORED = ScoredToken(
    chosen=TokenLogprob(token=TOKEN, data=SECRET.encode(), logprob=0.0),
    top=(TokenLogprob(token=TOKEN, data=SECRET.encode(), logprob=0.0),),
    text_offset=0,
)
END = Finished(
    reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=1),
    timing=Timing(first_scheduled_s=0, first_token_s=0, total_s=0, decode_s=0),
)
CALL: Call = read_chat(
    {
        "messages": [{"role": "user", "content": SECRET}],
        "stop": SECRET,
        "structured_outputs": {"regex": SECRET},
    }
)
HISTORY = History(ids=IDS, generated=np.array([TOKEN], np.int32))

HOLDERS: tuple[object, ...] = (
    CALL,
    Message(role="user", content=SECRET),
    Fitted(call=CALL, prompt=(TOKEN,)),
    Tool(name="f", description=SECRET, parameters=SECRET),
    ToolCall(id="1", name="f", arguments=SECRET),
    ToolDelta(index=0, arguments=SECRET),
    Said(index=0, text=SECRET, scored=(SCORED,), finished=END),
    Question(scope=b"", numbers=(SECRET,), vector=np.ones(2, np.float32)),
    GenerationRequest(
        id=RequestId("r"),
        prompt=(TOKEN,),
        sampling=PARAMS,
        constraint=Constraint(kind="regex", source=SECRET, begun=SECRET),
    ),
    TextDelta(text=SECRET, tokens=(TOKEN,), scored=(SCORED,)),
    SCORED,
    ExecutorStep(rows=(Row(tokens=IDS, past=0),)),
    Choice(sampled=(Sampled(token=TOKEN, logprob=0.0, top=((TOKEN, 0.0),)),)),
    Ask(draw=Draw(params=PARAMS, seed=0, position=1, history=HISTORY), draft=IDS),
    Wish(key=0, tokens=IDS, most=1),
    Ended(key=0, tokens=IDS, prompt_tokens=1),
    Draft(kind="lookup 2", tokens=(TOKEN,)),
    Knock(method="POST", path="/", key=SECRET, source=""),
    AccessSettings(state=Path("state"), redis=f"redis://:{SECRET}@localhost"),
)


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda one: type(one).__name__)
def test_what_people_say_is_in_no_repr(holder: object) -> None:
    assert SECRET not in repr(holder)
    assert str(TOKEN) not in repr(holder)
