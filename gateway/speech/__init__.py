"""Pure: what a conversation with a caller who speaks is, and what the words of a command mean."""

from gateway.speech.conversation import (
    Conversation,
    Detect,
    Ended,
    Event,
    Heard,
    Recognise,
    SpeechEnded,
    SpeechStarted,
    WrongAudio,
)
from gateway.speech.intents import Intent, Value, intent_of

__all__ = [
    "Conversation",
    "Detect",
    "Ended",
    "Event",
    "Heard",
    "Intent",
    "Recognise",
    "SpeechEnded",
    "SpeechStarted",
    "Value",
    "WrongAudio",
    "intent_of",
]
