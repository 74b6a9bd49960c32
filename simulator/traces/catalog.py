"""Published traces by name: where they are, under which licence, whom to cite, and what their files hash to. None is part of Baton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError

RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a trace. sha256: None where its publisher's file was not at hand when this was written; it is told after fetching."""

    url: str
    saved_as: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTrace:
    """A trace somebody published. No files: it has too many to fetch one by one, `about` says how to get them."""

    name: str
    format_name: str
    licence: str
    citation: str
    about: str
    home: str
    files: tuple[SourceFile, ...] = ()


_MOONCAKE = f"{RAW}/kvcache-ai/Mooncake/a2a4b18ac537fd798d50e6e9f57031ce86419a37/FAST25-release/traces"
_AZURE = f"{RAW}/Azure/AzurePublicDataset/790921015d50dd6aae7f7e47f39ba0e235ad6b08/data"
_RAGPULSE = f"{RAW}/flashserve/RAGPulse/99a62769a91d5ebd17a2d4ddbbc88c1d16edc0e8/data"
_QIN = 'Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025'
_PATEL = 'Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024'

KNOWN: Mapping[str, KnownTrace] = {
    trace.name: trace
    for trace in (
        KnownTrace(
            name="mooncake_conversation",
            format_name="mooncake",
            licence="Apache-2.0",
            citation=_QIN,
            about="online chat of Kimi, one hour, 12,031 requests; times in steps of 3 s, which --spread 3 spreads",
            home="https://github.com/kvcache-ai/Mooncake",
            files=(
                SourceFile(
                    url=f"{_MOONCAKE}/conversation_trace.jsonl",
                    saved_as="mooncake_conversation.jsonl",
                    sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
                ),
            ),
        ),
        KnownTrace(
            name="azure_2023_conv",
            format_name="azure",
            licence="CC-BY-4.0",
            citation=_PATEL,
            about="chat on Azure, one hour, 19,366 requests; lengths and times, nothing of what is shared",
            home="https://github.com/Azure/AzurePublicDataset",
            files=(
                SourceFile(
                    url=f"{_AZURE}/AzureLLMInferenceTrace_conv.csv",
                    saved_as="azure_2023_conv.csv",
                    sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
                ),
            ),
        ),
        KnownTrace(
            name="azure_2023_code",
            format_name="azure",
            licence="CC-BY-4.0",
            citation=_PATEL,
            about="code completion on Azure, one hour, 8,819 requests; lengths and times, nothing of what is shared",
            home="https://github.com/Azure/AzurePublicDataset",
            files=(SourceFile(url=f"{_AZURE}/AzureLLMInferenceTrace_code.csv", saved_as="azure_2023_code.csv"),),
        ),
        KnownTrace(
            name="ragpulse",
            format_name="ragpulse",
            licence="MIT",
            citation="RAGPulse, github.com/flashserve/RAGPulse",
            about="question answering over documents at a university, one week, 7,106 requests; slow, so give it a --rate",
            home="https://github.com/flashserve/RAGPulse",
            files=(
                SourceFile(url=f"{_RAGPULSE}/0_trace.jsonl", saved_as="ragpulse.jsonl"),
                *(
                    SourceFile(url=f"{_RAGPULSE}/{part}.jsonl", saved_as=f"ragpulse_component_lengths_{part}.jsonl")
                    for part in ("1_sys_prompt", "2_passages", "3_history", "4_user_input", "5_web_search")
                ),
            ),
        ),
        KnownTrace(
            name="claude_code_sessions",
            format_name="sessions",
            licence="Apache-2.0",
            citation="kv-cache-tester, github.com/callanjfox/kv-cache-tester",
            about="agentic coding sessions; clone the repository and name its folder traces/ where a trace is asked for",
            home="https://github.com/callanjfox/kv-cache-tester",
        ),
    )
}

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", "")


def find(name: str, folder: Path) -> Path:
    """The file, or folder of files, a user means: a path, or a name in `folder` without its suffix.

    Raises:
        ConfigError: there is none; says where it was looked for and how to get it.
    """
    if Path(name).exists():
        return Path(name)
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").exists():
            return folder / f"{name}{suffix}"
    remedy = f"`baton trace fetch {name}` gets it" if name in KNOWN and KNOWN[name].files else "`baton trace list` names those known"
    raise ConfigError(f"there is no trace {name}, nor {name}.jsonl or {name}.csv (.gz) in {folder}; {remedy}")
