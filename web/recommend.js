// Shows the table of GGUFRecommend in its node, with the widget of ComfyUI's own "Preview as Text".
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "GGUFNative.Recommend",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "GGUFRecommend") return;
    const { addTextPreviewWidgets, updateTextPreviewWidgets } = window.comfyAPI.textPreviewWidgets;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this);
      addTextPreviewWidgets(this);
      this.setSize([820, 480]);
    };
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, [output]);
      updateTextPreviewWidgets(this, output);
    };
  },
});
