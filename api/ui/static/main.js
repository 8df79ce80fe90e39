// The page: its tabs on small screens, the chat and the live view.

import { startChat } from "./chat.js";
import { byId } from "./dom.js";
import { startLive } from "./live.js";
import { addSettings } from "./settings.js";

function showTab(name) {
  document.body.dataset.tab = name;
  for (const tab of ["chat", "live"]) byId(`tab-${tab}`).ariaPressed = String(tab === name);
}

for (const name of ["chat", "live"]) byId(`tab-${name}`).addEventListener("click", () => showTab(name));
addSettings();
startChat();
// Before the live view, which may open the dialog for the key: its end returns the focus to the input.
byId("input").focus();
startLive();
