"""The endpoints that orchestrators and routers probe: liveness, and vLLM's and SGLang's words about the server."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from api.generation.loaded_model import PACELINE_VERSION, AppState
from api.http.responses import JSONResponse
from api.schema.replies import HealthReply
from engine import EngineFault


class ProbeEndpoints:
    """The endpoints /livez, /is_sleeping, /server_info and /model_info."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def live(self, request: Request) -> Response:
        """Returns 200 while the model loads, is served or drains. Raises the EngineFault that ended the engine, after
        which only a restart helps, or EngineStalled."""
        loaded = self._state.loaded
        if loaded is not None and (fault := loaded.engine.fault) is not None:
            raise EngineFault(str(fault), fatal=True)
        if loaded is not None and (stall := loaded.engine.stall) is not None:
            raise stall
        return JSONResponse(HealthReply())

    async def is_sleeping(self, request: Request) -> Response:
        """Returns false in vLLM's shape: a loaded model stays in memory."""
        return JSONResponse({"is_sleeping": False})

    async def server_info(self, request: Request) -> Response:
        """Returns the fields of SGLang's reply that routers read."""
        model = self._state.model
        engine = model.engine
        generates = engine.info.generates
        return JSONResponse(
            {
                "model_path": engine.info.path,
                "served_model_name": model.name,
                "version": PACELINE_VERSION,
                "is_embedding": not generates,
                "tp_size": 1,
                "dp_size": 1,
                "pp_size": 1,
                **(
                    {
                        "context_length": engine.request_limit,
                        "max_total_tokens": engine.stats().cells,
                        "max_running_requests": engine.slots,
                    }
                    if generates
                    else {}
                ),
            }
        )

    async def model_info(self, request: Request) -> Response:
        """Returns the fields of SGLang's reply that routers read."""
        info, media = self._state.model.engine.info, self._state.model.prompts.media
        return JSONResponse(
            {
                "model_path": info.path,
                "tokenizer_path": info.path,
                "is_generation": info.generates,
                "has_image_understanding": media.vision,
                "has_audio_understanding": media.audio,
            }
        )
