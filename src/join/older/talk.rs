//! One stream of the older protocol: what is said, and what is heard.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use crate::cluster::ClusterError;
use crate::join::session::unusable;
use crate::join::{JoinError, Proof};
use crate::pb::teleport::join::v1::{challenge, challenge_solution};

/// An open stream of questions `Q` and answers `A`.
pub(super) struct Talk<Q, A> {
    call: &'static str,
    method: &'static str,
    questions: mpsc::Sender<Q>,
    answers: Streaming<A>,
}

impl<Q, A> Talk<Q, A> {
    /// Opens the stream `call` for a join by `method`, which begins with `first` if the client does.
    pub(super) async fn open<F>(
        call: &'static str,
        method: &'static str,
        first: Option<Q>,
        open: impl FnOnce(ReceiverStream<Q>) -> F,
    ) -> Result<Self, JoinError>
    where
        F: Future<Output = Result<Response<Streaming<A>>, Status>>,
    {
        let (questions, receiver) = mpsc::channel(1);
        if let Some(first) = first {
            // There is room for it; a stream that is gone shows in the next message.
            drop(questions.send(first).await);
        }
        let answers = open(ReceiverStream::new(receiver))
            .await
            .map_err(|status| JoinError::cluster(method)(ClusterError::call(call)(status)))?
            .into_inner();
        Ok(Self {
            call,
            method,
            questions,
            answers,
        })
    }

    pub(super) async fn say(&self, question: Q) {
        // A stream that is gone shows in the next message.
        drop(self.questions.send(question).await);
    }

    pub(super) async fn hear(&mut self) -> Result<A, JoinError> {
        self.answers
            .message()
            .await
            .map_err(ClusterError::call(self.call))
            .and_then(|message| {
                message.ok_or_else(|| unusable(self.call, "the stream ended early"))
            })
            .map_err(JoinError::cluster(self.method))
    }

    /// Has `proof` answer `challenge`. A proof that fails ends the stream, and nothing was sent.
    pub(super) async fn solve(
        &self,
        proof: &mut dyn Proof,
        challenge: challenge::Payload,
        now: std::time::SystemTime,
    ) -> Result<challenge_solution::Payload, JoinError> {
        proof
            .solve(challenge, now)
            .await?
            .ok_or_else(|| self.unusable("it sent a challenge that has no place in this method"))
    }

    /// Why what was heard is of no use.
    pub(super) fn unusable(&self, problem: &str) -> JoinError {
        JoinError::cluster(self.method)(unusable(self.call, problem))
    }
}
