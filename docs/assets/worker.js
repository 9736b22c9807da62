/* Browsers refuse workers to pages that were opened from a disk. There the search's worker runs in a hidden frame. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      this.inside = this.frame.contentWindow
      addEventListener("message", event => {
        if (event.source !== this.inside) return
        event.stopImmediatePropagation()
        const message = new MessageEvent("message", {data: event.data})
        this.dispatchEvent(message)
        if (this.onmessage) this.onmessage(message)
      })
      const page = this.inside.document
      page.open()
      page.write(`<body><script>
        postMessage = data => parent.dispatchEvent(new MessageEvent("message", {data, source: window}))
        importScripts = (...urls) => urls.reduce((before, src) => before.then(() => new Promise(done => {
          const script = document.createElement("script")
          script.src = src
          script.onload = done
          document.body.append(script)
        })), Promise.resolve())
      <\/script><script src="${url}"><\/script>`)
      page.close()
      this.loaded = new Promise(done => this.frame.addEventListener("load", done, {once: true}))
    }

    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", {data})))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
