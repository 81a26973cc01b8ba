//! When to consume: periods that start by cron expressions in a time zone, and the time of day by which a backlog must
//! be done. Pure: the current time is an argument.
//!
//! A period's length is elapsed time from its start. If clocks go forward over a start, the period starts right after
//! the skip; if they go back over a start, the period starts once (croner's rules, which are those of Vixie cron).

use croner::Cron;
use croner::parser::CronParser;
use jiff::civil::Time;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan, Zoned};

use crate::settings::{self, Outside};

/// How many periods that follow each other without a gap are followed to find the end of consumption.
const MAX_ADJOINING_PERIODS: usize = 64;

/// When to consume.
#[derive(Debug, Clone)]
pub struct Schedule {
    zone: TimeZone,
    /// Start and length of each period.
    periods: Vec<(Cron, SignedDuration)>,
    finish_by: Option<Time>,
    pub outside: Outside,
    pub unload_model: bool,
}

/// What to do at a given time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Consume until this time; `None` if there is no end.
    Open { until: Option<Timestamp> },
    /// Do not consume until this time.
    Closed { until: Timestamp },
}

impl Schedule {
    /// Key and message of each problem.
    pub fn check(settings: &settings::Schedule) -> Vec<(String, String)> {
        Self::read(settings, Timestamp::now()).err().unwrap_or_default()
    }

    /// `None` if the settings have a problem, which [`Schedule::check`] reports.
    pub fn new(settings: &settings::Schedule) -> Option<Self> {
        Self::read(settings, Timestamp::now()).ok()
    }

    fn read(settings: &settings::Schedule, now: Timestamp) -> Result<Self, Vec<(String, String)>> {
        let mut faults = Vec::new();
        let mut fault = |key: &str, message: String| faults.push((format!("schedule.{key}"), message));
        let zone = TimeZone::get(&settings.timezone).unwrap_or_else(|_| {
            fault(
                "timezone",
                format!("{:?} is not an IANA time zone such as Europe/Berlin", settings.timezone),
            );
            TimeZone::UTC
        });
        let mut periods = Vec::new();
        for (i, period) in settings.periods.iter().enumerate() {
            let cron = match CronParser::new().parse(&period.cron) {
                Ok(cron) => cron,
                Err(error) => {
                    fault(
                        &format!("periods.{i}.cron"),
                        format!("{:?} is not a valid cron expression: {error}", period.cron),
                    );
                    continue;
                }
            };
            let length = SignedDuration::try_from(period.duration.0).unwrap_or(SignedDuration::MAX);
            if length.is_zero() {
                fault(&format!("periods.{i}.duration"), "is zero".to_owned());
            }
            if cron.find_next_occurrence(&now.to_zoned(zone.clone()), true).is_err() {
                fault(&format!("periods.{i}.cron"), format!("{:?} never matches a date", period.cron));
            }
            periods.push((cron, length));
        }
        let finish_by = settings.finish_by.as_ref().and_then(|text| {
            let time = Time::strptime("%H:%M", text);
            if time.is_err() {
                fault("finish_by", format!("{text:?} is not a time of day such as 06:00"));
            }
            time.ok()
        });
        if settings.unload_model && settings.outside == Outside::Stay {
            fault(
                "unload_model",
                "needs outside: leave, because a member that stays in the group keeps its model".to_owned(),
            );
        }
        if settings.periods.is_empty() && (settings.unload_model || settings.outside == Outside::Leave) {
            let key = if settings.unload_model { "unload_model" } else { "outside" };
            fault(key, "has no effect without schedule.periods".to_owned());
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        let (outside, unload_model) = (settings.outside, settings.unload_model);
        Ok(Self { zone, periods, finish_by, outside, unload_model })
    }

    /// A schedule that always consumes and has no `finish_by`.
    pub fn always() -> Self {
        Self {
            zone: TimeZone::UTC,
            periods: Vec::new(),
            finish_by: None,
            outside: Outside::Stay,
            unload_model: false,
        }
    }

    /// Whether `schedule.periods` is set.
    pub fn has_periods(&self) -> bool {
        !self.periods.is_empty()
    }

    /// The phase at `now`.
    pub fn at(&self, now: Timestamp) -> Phase {
        if self.periods.is_empty() {
            return Phase::Open { until: None };
        }
        let Some(mut until) = self.end_at(now) else {
            let now = now.to_zoned(self.zone.clone());
            let next = |(cron, _): &(Cron, SignedDuration)| cron.find_next_occurrence(&now, false).ok();
            let next = self.periods.iter().filter_map(next).map(|begin: Zoned| begin.timestamp()).min();
            // `check` refuses a cron that never matches a date, but one may have matched for the last time.
            return Phase::Closed { until: next.unwrap_or(Timestamp::MAX) };
        };
        for _ in 0..MAX_ADJOINING_PERIODS {
            match self.end_at(until) {
                Some(later) => until = later,
                None => return Phase::Open { until: Some(until) },
            }
        }
        Phase::Open { until: None }
    }

    /// The latest end of the periods that `now` lies in; `None` outside of all periods.
    fn end_at(&self, now: Timestamp) -> Option<Timestamp> {
        let zoned = now.to_zoned(self.zone.clone());
        let end = |(cron, length): &(Cron, SignedDuration)| {
            let begin: Zoned = cron.find_previous_occurrence(&zoned, true).ok()?;
            begin.timestamp().checked_add(*length).ok()
        };
        self.periods.iter().filter_map(end).filter(|end| *end > now).max()
    }

    /// The first `finish_by` after `now`.
    pub fn deadline(&self, now: Timestamp) -> Option<Timestamp> {
        let time = self.finish_by?;
        let today = now.to_zoned(self.zone.clone()).date();
        // If clocks go forward over this time of day, the deadline is right after the skip.
        (0..2)
            .filter_map(|days| today.checked_add(days.days()).ok())
            .filter_map(|date| date.to_datetime(time).to_zoned(self.zone.clone()).ok())
            .map(|at| at.timestamp())
            .find(|at| *at > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Period, Wait};

    fn settings(periods: &[(&str, &str)], timezone: &str) -> settings::Schedule {
        let period = |(cron, duration): &(&str, &str)| Period {
            cron: (*cron).to_owned(),
            duration: Wait::try_from((*duration).to_owned()).unwrap(),
        };
        settings::Schedule {
            periods: periods.iter().map(period).collect(),
            timezone: timezone.to_owned(),
            ..Default::default()
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[track_caller]
    fn open(schedule: &Schedule, now: &str, until: &str) {
        assert_eq!(schedule.at(at(now)), Phase::Open { until: Some(at(until)) }, "{now}");
    }

    #[track_caller]
    fn closed(schedule: &Schedule, now: &str, until: &str) {
        assert_eq!(schedule.at(at(now)), Phase::Closed { until: at(until) }, "{now}");
    }

    #[test]
    fn nights_of_workdays_and_whole_weekends() {
        let schedule = Schedule::new(&settings(
            &[("0 22 * * MON-FRI", "8h"), ("0 0 * * SAT,SUN", "24h")],
            "Europe/Berlin",
        ))
        .unwrap();
        // Wednesday, in winter: UTC+1.
        closed(&schedule, "2026-11-25T12:00:00Z", "2026-11-25T21:00:00Z");
        open(&schedule, "2026-11-25T21:00:00Z", "2026-11-26T05:00:00Z");
        open(&schedule, "2026-11-26T04:59:59Z", "2026-11-26T05:00:00Z");
        closed(&schedule, "2026-11-26T05:00:00Z", "2026-11-26T21:00:00Z");
        // From Friday night on there is no gap until Monday.
        open(&schedule, "2026-11-27T22:00:00Z", "2026-11-29T23:00:00Z");
        // In summer: UTC+2.
        closed(&schedule, "2026-07-01T12:00:00Z", "2026-07-01T20:00:00Z");
    }

    #[test]
    fn a_clock_change_does_not_alter_the_length_of_a_period() {
        let schedule = Schedule::new(&settings(&[("0 22 * * *", "8h")], "Europe/Berlin")).unwrap();
        // 28 to 29 March 2026: 02:00 becomes 03:00. 22:00 is 21:00 UTC; eight hours later it is 07:00.
        open(&schedule, "2026-03-28T23:00:00Z", "2026-03-29T05:00:00Z");
        closed(&schedule, "2026-03-29T05:00:00Z", "2026-03-29T20:00:00Z");
        // 24 to 25 October 2026: 03:00 becomes 02:00. 22:00 is 20:00 UTC; eight hours later it is 05:00.
        open(&schedule, "2026-10-24T23:00:00Z", "2026-10-25T04:00:00Z");
    }

    #[test]
    fn a_start_that_clocks_skip_or_repeat_happens_once() {
        let schedule = Schedule::new(&settings(&[("30 2 * * *", "1h")], "Europe/Berlin")).unwrap();
        // 02:30 does not exist on 29 March 2026: the period starts at 03:00, which is 01:00 UTC.
        closed(&schedule, "2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z");
        open(&schedule, "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z");
        // 02:30 exists twice on 25 October 2026, at 00:30 and at 01:30 UTC: the first one counts.
        open(&schedule, "2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z");
        closed(&schedule, "2026-10-25T01:30:00Z", "2026-10-26T01:30:00Z");
    }

    #[test]
    fn adjoining_periods_and_no_periods_have_no_end() {
        let all = Schedule::new(&settings(&[("0 * * * *", "1h")], "UTC")).unwrap();
        assert_eq!(all.at(at("2026-11-25T12:30:00Z")), Phase::Open { until: None });
        let none = Schedule::new(&settings(&[], "UTC")).unwrap();
        assert_eq!(none.at(at("2026-11-25T12:30:00Z")), Phase::Open { until: None });
        assert_eq!(none.deadline(at("2026-11-25T12:30:00Z")), None);
    }

    #[test]
    fn the_deadline_is_the_next_finish_by_in_the_time_zone() {
        let mut settings = settings(&[], "America/New_York");
        settings.finish_by = Some("06:00".to_owned());
        let schedule = Schedule::new(&settings).unwrap();
        assert_eq!(schedule.deadline(at("2026-11-25T10:59:59Z")), Some(at("2026-11-25T11:00:00Z")));
        assert_eq!(schedule.deadline(at("2026-11-25T11:00:00Z")), Some(at("2026-11-26T11:00:00Z")));
        // 02:30 does not exist on 8 March 2026: the deadline is 03:30.
        settings.finish_by = Some("02:30".to_owned());
        let schedule = Schedule::new(&settings).unwrap();
        assert_eq!(schedule.deadline(at("2026-03-08T06:00:00Z")), Some(at("2026-03-08T07:30:00Z")));
    }

    #[test]
    fn problems_name_their_keys() {
        let mut wrong =
            settings(&[("0 25 * * *", "1h"), ("0 0 30 2 *", "1h"), ("0 0 * * *", "0s")], "Mars/Base");
        wrong.finish_by = Some("25:00".to_owned());
        wrong.unload_model = true;
        let keys: Vec<String> = Schedule::check(&wrong).into_iter().map(|(key, _)| key).collect();
        assert_eq!(
            keys,
            [
                "schedule.timezone",
                "schedule.periods.0.cron",
                "schedule.periods.1.cron",
                "schedule.periods.2.duration",
                "schedule.finish_by",
                "schedule.unload_model",
            ]
        );
    }
}
