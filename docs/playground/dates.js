// The dates task, as minillama/data.py has it, from the browser's own copy of the Unicode CLDR: Intl writes what Babel
// does. A day is a number, 0 for 1 January 1900; the calendar is UTC's, so that no time zone moves it.

export const FORMATS = ["medium", "long", "full"];
const FIRST_DAY = Date.UTC(1900, 0, 1), DAY = 86_400_000, DAYS = 73_049; // to 31 December 2099
const LOCALES = { en: ["en-US", "en-GB"] };
const writers = new Map();

/** A day in words: written(44_257, "long", "fr") is "3 mars 2021". */
export function written(day, format, locale) {
  const key = `${locale} ${format}`;
  if (!writers.has(key)) {
    const tag = `${locale}-u-ca-gregory-nu-latn`;
    writers.set(key, new Intl.DateTimeFormat(tag, { dateStyle: format, timeZone: "UTC" }));
  }
  return writers.get(key).format(new Date(FIRST_DAY + day * DAY));
}

export const iso = (day) => new Date(FIRST_DAY + day * DAY).toISOString().slice(0, 10);
export const dayOf = (text) => Math.round((Date.parse(`${text}T00:00:00Z`) - FIRST_DAY) / DAY);
export const locales = (language) => LOCALES[language] ?? [language];

/** The English name of a language; throws a sentence for a tag that this browser has no dates of. */
export function languageName(tag) {
  let known = [];
  try {
    known = Intl.DateTimeFormat.supportedLocalesOf([tag]);
  } catch {} // not even the form of a tag
  if (!known.length) throw new Error(`this browser writes no dates in “${tag}”: give a tag such as fr, pt-BR or sw`);
  return new Intl.DisplayNames(["en"], { type: "language" }).of(tag);
}

const encoder = new TextEncoder(), decoder = new TextDecoder();
export const encode = (string) => Array.from(encoder.encode(string)); // a token is a byte
export const decode = (ids) => decoder.decode(Uint8Array.from(ids));

/** Whether a day is kept for testing: every tenth, by a hash of its number. None of them is trained on. */
export const unseen = (day) => (Math.imul(day + 1, 2654435761) >>> 0) % 10 === 0;

/** A random date of a language: {text, iso, prompt, answer}, the last two as ids; `test`: of an unseen day. */
export function example(language, { uniform }, test = false) {
  const draw = (list) => list[Math.floor(uniform() * list.length)];
  let day;
  do day = Math.floor(uniform() * DAYS);
  while (unseen(day) !== test);
  const format = draw(FORMATS), words = written(day, format, draw(locales(language)));
  return { text: words, iso: iso(day), prompt: encode(`${words} = `), answer: encode(`${iso(day)}\n`) };
}

/** The ISO date that a text names, where one of the languages writes it so; else null. */
export function truth(words, languages) {
  const year = words.match(/(19|20)\d\d/)?.[0], key = `${year} ${languages}`;
  if (!year) return null;
  if (!truths.has(key)) {
    const known = new Map(), first = dayOf(`${year}-01-01`);
    for (let day = first; iso(day).startsWith(year); day++) {
      for (const locale of languages.flatMap(locales)) {
        for (const format of FORMATS) known.set(written(day, format, locale).normalize(), iso(day));
      }
    }
    truths.set(key, known);
  }
  return truths.get(key).get(words.trim().normalize()) ?? null;
}
const truths = new Map();
