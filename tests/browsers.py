"""A Chromium without a window, driven through its DevTools protocol as a user drives it."""

import collections
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECONDS = 60  # for an answer of the browser; the machine may be busy

_FLAGS = [
    "--headless=new",
    "--no-sandbox",  # which Chromium cannot set up as root, as in most containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
]


class Browser:
    """The process, and messages to it and from it: JSON that ends in a null byte."""

    def __init__(self, folder):
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; the shell moves ours there.
        shell = f'exec "$@" 3<&{commands} 4>&{answers}'
        program = [PROGRAM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *program],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._left, self._number = b"", 0
        self.events = collections.defaultdict(list)  # by session

    def call(self, method, session=None, **parameters):
        """The result of a command, which must not fail."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = self.next_message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def next_message(self):
        """An answer or an event; events are kept too."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium says nothing for {SECONDS} s"
            data = os.read(self._answers, 1 << 20)
            assert data, f"Chromium has ended with {self._process.wait()}"
            self._left += data
        line, self._left = self._left.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events[message.get("sessionId")].append(message)
        return message

    @contextlib.contextmanager
    def page(self, width=1280):
        """A new tab of that width, with nothing stored."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, session["sessionId"])
        page.resize(width)
        try:
            yield page
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self):
        try:
            self.call("Browser.close")
            self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._commands)
            os.close(self._answers)


class Page:
    """A tab."""

    def __init__(self, browser, session):
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def _events(self, method):
        events = self._browser.events[self._session]
        return [event["params"] for event in events if event["method"] == method]

    def open(self, url):
        """Opens the address and waits until all of it is loaded."""
        loaded = len(self._events("Page.loadEventFired"))
        assert not self._call("Page.navigate", url=url).get("errorText")
        while len(self._events("Page.loadEventFired")) == loaded:
            self._browser.next_message()

    def resize(self, width, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme):
        """ "dark" or "light"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def value(self, expression):
        """The value of an expression of JavaScript, which must not throw."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression):
        """Waits until an expression of JavaScript is true."""
        end = time.monotonic() + SECONDS
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"{expression} stays false"
            time.sleep(0.02)

    def click(self, selector):
        """Clicks where the middle of an element is seen, whatever lies there."""
        x, y = self.value(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center", behavior: "instant"}});
            const {{x, y, width, height}} = element.getBoundingClientRect();
            return [x + width / 2, y + height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", type=kind, **mouse)

    def type(self, selector, text):
        """Clicks into a field and replaces what is in it."""
        self.click(selector)
        self.value("document.activeElement.select()")
        if text:
            self._call("Input.insertText", text=text)
        else:
            self.press("Delete", 46)

    def press(self, key, code, text="", modifiers=0):
        """Presses a key; `modifiers` 2 is Ctrl."""
        key = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **key)
        self._call("Input.dispatchKeyEvent", type="keyUp", **key)

    def errors(self):
        """What the console shows in red."""
        thrown = [
            event["exceptionDetails"]["text"] for event in self._events("Runtime.exceptionThrown")
        ]
        called = self._events("Runtime.consoleAPICalled")
        logged = [event["entry"] for event in self._events("Log.entryAdded")]
        return [
            *thrown,
            *(str(event["args"]) for event in called if event["type"] in ("error", "assert")),
            *(
                f"{entry['text']} {entry.get('url', '')}"
                for entry in logged
                if entry["level"] == "error"
            ),
        ]

    def requests(self):
        """The addresses that were asked for since it was made."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def wider(self):
        """Elements that reach out of the page to the right; none if it needs no scrolling."""
        return self.value("""(() => {
            const {scrollWidth, clientWidth} = document.documentElement;
            const out = [...document.querySelectorAll("body *")].filter(
                element => element.getBoundingClientRect().right > clientWidth + 0.5);
            const names = out.map(element => element.outerHTML.slice(0, 80));
            return scrollWidth > clientWidth && !names.length ? ["the page"] : names;
        })()""")

    def overlaps(self):
        """Pairs of texts of which one covers a quarter of the other."""
        return self.value("""(() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            const boxes = [], range = document.createRange();
            while (walker.nextNode()) {
                const node = walker.currentNode;
                if (!node.data.trim() || !node.parentElement.checkVisibility()) continue;
                range.selectNodeContents(node);
                for (const box of range.getClientRects())
                    if (box.width > 1) boxes.push({box, node});
            }
            boxes.sort((one, other) => one.box.top - other.box.top);
            const found = [];
            boxes.forEach(({box: a, node}, number) => {
                for (let next = number + 1; next < boxes.length; next++) {
                    const b = boxes[next].box;
                    if (b.top >= a.bottom) break;
                    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                    const height = Math.min(a.bottom, b.bottom) - b.top;
                    const smaller = Math.min(a.width * a.height, b.width * b.height);
                    if (width > 0 && width * height > smaller / 4)
                        found.push(`${node.data.trim()} / ${boxes[next].node.data.trim()}`);
                }
            });
            return found;
        })()""")

    def faint(self):
        """Texts whose contrast with what is behind them is below 4.5, that of WCAG AA."""
        return self.value("""(() => {
            const canvas = document.createElement("canvas");
            const pen = canvas.getContext("2d", {willReadFrequently: true});
            const parse = colour => {  // whatever space it is written in
                pen.clearRect(0, 0, 1, 1);
                pen.fillStyle = colour;
                pen.fillRect(0, 0, 1, 1);
                return [...pen.getImageData(0, 0, 1, 1).data];
            };
            const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            const light = ([red, green, blue]) => 0.2126 * linear(red / 255)
                + 0.7152 * linear(green / 255) + 0.0722 * linear(blue / 255);
            const behind = element => {
                const colour = parse(getComputedStyle(element).backgroundColor);
                return colour[3] ? colour : behind(element.parentElement);
            };
            const contrast = element => {
                const part = element.matches(":placeholder-shown") ? "::placeholder" : null;
                const style = getComputedStyle(element, part);
                const colour = element instanceof SVGElement ? style.fill : style.color;
                const pair = [light(parse(colour)), light(behind(element))];
                return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            };
            const texts = [...document.querySelectorAll("body *:not(script)")].filter(
                element => element.checkVisibility() && (element.placeholder ||
                    [...element.childNodes].some(
                        node => node.nodeType === Node.TEXT_NODE && node.data.trim())));
            return texts.filter(element => contrast(element) < 4.5).map(
                element => `${contrast(element).toFixed(2)} ${element.outerHTML.slice(0, 80)}`);
        })()""")
